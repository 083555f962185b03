"""Batches: a file of requests in, a file of replies out."""
