"""Matrix products with quantised and float weights."""
