"""The decode loop: draft, verify, accept, sample."""
