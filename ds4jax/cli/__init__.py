"""The command line of ds4jax."""
