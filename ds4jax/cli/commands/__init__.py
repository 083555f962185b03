"""The commands of ds4jax, one file each."""
