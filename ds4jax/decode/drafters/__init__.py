"""Drafters: each proposes the next tokens in its own way. `ds4jax.decode.drafter` defines what the loop asks of them."""
