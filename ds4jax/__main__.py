"""`python -m ds4jax` is the command `ds4jax`."""

import sys

from ds4jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
