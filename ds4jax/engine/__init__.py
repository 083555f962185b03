"""The engine: prefill, calls of the decode loop, sessions and their files."""
