"""The cache: its layout, how rows are stored, and its capacity."""
