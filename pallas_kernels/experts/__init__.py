"""Routed experts: router, grouping, products and SwiGLU."""
