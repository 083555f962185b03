"""One model on 1 to 8 devices of a CPU, and on groups of them: the same bits, a share for each, and no sum over devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_files import needs_main
from mesh_worker import opened

from ds4jax.loading.plan import share_bytes
from pallas_kernels.linear.cut import AXIS

WORKER = Path(__file__).parents[1] / "mesh_worker.py"
ALL = "logits,tokens,engine,session"


def measured(name: str, parts: str, *layouts: int | str) -> dict[str, Any]:
    """What the worker found for each number of devices, or of devices and groups."""
    words = [sys.executable, str(WORKER), name, parts, *map(str, layouts)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "parts", "counts"),
    [
        pytest.param("layer", "logits", (1, 2), marks=pytest.mark.long),
        pytest.param("hub", "logits,tokens", (1, 2), marks=pytest.mark.slow),
        # A session is saved on the first number of devices, and goes on there and on the others.
        pytest.param("mtp", ALL, (2, 1), marks=pytest.mark.slow),
        pytest.param("mtp", ALL, (1, 4, 8), marks=pytest.mark.slow),
        pytest.param("whole-heads", "logits,tokens", (1, 4), marks=pytest.mark.slow),
        pytest.param("dspark", "logits,tokens", (1, 2, 8), marks=pytest.mark.slow),
        pytest.param("tiny", ALL, (2, 1, 4, 8), marks=pytest.mark.slow),
        pytest.param("hub", "logits,tokens", (1, 4, 8), marks=pytest.mark.slow),
        pytest.param("gguf", "logits,tokens", (1, 2, 4, 8), marks=[pytest.mark.slow, needs_main]),
        pytest.param("mxfp4", "logits,tokens", (1, 2, 4, 8), marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_on_any_number_of_devices(name: str, parts: str, counts: tuple[int, ...]) -> None:
    """Logits, tokens and fingerprints, strict and not, at every number of drafts, of four requests at once, and resumed."""
    checkpoint = opened(name)
    found = {int(count): one for count, one in measured(name, parts, *counts).items()}
    expected = found[counts[0]]["equal"]
    assert list(expected) == ["fingerprint", *parts.split(",")]
    for count, one in found.items():
        assert one["held"] == [share_bytes(checkpoint, count)] * count
        for part, value in expected.items():
            assert one["equal"][part] == value, f"{part} of {count} devices differs from {counts[0]}"
        gathers = one["lowered"].pop("all_gather", 0)
        # Jitted layers are lowered once for each kind. The embedding and the head gather once each.
        assert gathers > 2 if count > 1 else gathers == 0
        assert not any(one["lowered"].values())


@pytest.mark.parametrize(
    ("name", "parts", "layouts"),
    [
        pytest.param("layer", "slots", ("1/1", "2/2"), marks=pytest.mark.long),
        # One sequence is whole on all groups.
        pytest.param("mtp", "tokens,slots", ("1/1", "2/2", "4/2"), marks=pytest.mark.slow),
        pytest.param("mtp", "slots", ("1/1", "8/2", "8/4"), marks=pytest.mark.slow),
        pytest.param("dspark", "slots", ("1/1", "4/2", "4/4"), marks=pytest.mark.slow),
        pytest.param("tiny", "slots,session", ("4/2", "1/1", "2/2"), marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_on_any_number_of_groups(name: str, parts: str, layouts: tuple[str, ...]) -> None:
    """Requests of an engine with four slots, whose groups have their part of the state and exchange nothing in a step."""
    found, checkpoint = measured(name, parts, *layouts), opened(name)
    expected, state = found["1/1"]["equal"], found["1/1"]["state"][0]
    assert list(expected) == ["fingerprint", *parts.split(",")]
    for strict in ("strict False", "strict True"):
        replies, reused, freed = expected["slots"][strict]
        assert len(replies) == 9
        assert any(reused), "beginnings are found"
        assert freed, "a free slot has the state of a new one"
    for layout, one in found.items():
        devices, groups = map(int, layout.split("/"))
        size = devices // groups
        assert one["equal"] == expected, layout
        assert one["held"] == [share_bytes(checkpoint, size)] * devices
        assert one["state"] == [state // groups] * devices
        gathers = one["call"]["counts"].pop("all_gather")
        assert not any(one["call"]["counts"].values())
        assert gathers > 2 if size > 1 else gathers == 0
        within = [[first + i for i in range(size)] for first in range(0, devices, size)]
        assert one["call"]["members"] in (([str(within)], [AXIS]) if gathers else ([],))
