"""One model on 1, 2, 4 and 8 devices of a CPU: the same bits, a share for each device, and no sum over devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mesh_worker import CONFIGS

from ds4jax.loading.plan import share_bytes
from ds4jax.random_models import checkpoint as synthetic

WORKER = Path(__file__).parents[1] / "mesh_worker.py"


def measured(name: str, *counts: int) -> dict[int, Any]:
    """What the worker found for each number of devices."""
    words = [sys.executable, str(WORKER), name, *map(str, counts)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return {int(count): found for count, found in json.loads(done.stdout).items()}


def assert_equal_bits(found: dict[int, Any]) -> None:
    first, *others = found
    for count in others:
        assert found[count]["fingerprint"] == found[first]["fingerprint"]
        for part, expected in found[first]["equal"].items():
            assert found[count]["equal"][part] == expected, f"{part} of {count} devices differs from {first}"


def assert_shares(name: str, found: dict[int, Any]) -> None:
    checkpoint = synthetic.checkpoint(*CONFIGS[name])
    for count, one in found.items():
        assert one["held"] == [share_bytes(checkpoint, count)] * count


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        pytest.param("mtp", (2, 1), marks=pytest.mark.long),
        pytest.param("mtp", (1, 4, 8), marks=pytest.mark.slow),
        pytest.param("whole-heads", (1, 4), marks=pytest.mark.slow),
        pytest.param("dspark", (1, 2, 8), marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_on_any_number_of_devices(name: str, counts: tuple[int, ...]) -> None:
    """Prefill logits, tokens and fingerprints, strict and not, without drafts and with most, two requests at once."""
    found = measured(name, *counts)
    assert_equal_bits(found)
    assert_shares(name, found)
    for count in set(counts) - {1}:
        text = found[count]["lowered"]
        # Jitted layers are lowered once for each kind: two here. The embedding and the head gather once each.
        assert text.pop("all_gather") > 2
        assert not any(text.values())
    if counts == (2, 1):
        # Saved on two devices, restored there and on one.
        assert found[1]["resumed"] == found[2]["resumed"]
