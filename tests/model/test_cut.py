"""Products of weights that are cut over devices have the bits of one device. `engine/test_mesh.py` compares whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parents[1] / "cut_worker.py"


def test_a_cut_weight_has_the_bits_of_the_whole() -> None:
    """Dense, grouped and experts' products, float and Q8_0, strict and not; rows of a table, norms of heads, whole attention."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, str(WORKER), "1", "8"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    one, eight = json.loads(done.stdout).values()
    assert len(one) == 16
    assert [name for name, bits in one.items() if eight[name] != bits] == []
