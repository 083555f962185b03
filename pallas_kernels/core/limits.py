"""Limits that kernels, the gate and the model share."""

from __future__ import annotations

# Maximum rows of activations of a program: registers hold the sums of all of them.
MAX_ROWS = 8
# Maximum rows of a decode step by kernels: rows of attention and expert pairs have arrays of their own.
STEP_ROWS = 64
