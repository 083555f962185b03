"""Limits that kernels, the gate and the model share."""

from __future__ import annotations

# Maximum rows of a launch: registers hold the sums of all rows.
MAX_ROWS = 8
