"""Hyper-connections: residual streams that are mixed by a doubly stochastic matrix."""
