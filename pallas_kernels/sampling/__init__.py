"""Sampling: the tokens that the filters keep, and the draw of one of them."""
