"""Attention with a sink over the window and compressed rows."""
