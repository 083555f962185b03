"""The compressor: one row for each block of tokens."""
