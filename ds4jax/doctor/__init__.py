"""Finds what is wrong with an installation, and says what to do. Imports no JAX, which may not start."""
