"""Random weights on several devices: each makes its own part, with the values that one device makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from ds4jax.loading.cuts import cut_names
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.formats import Quantized


@pytest.mark.parametrize("layout", ["small-q2", "small-ud-iq3-xxs"])
def test_some_rows_have_the_values_of_the_whole(layout: str) -> None:
    config = synthetic.config_of(layout, 1)
    cut = cut_names(config, 2)
    for tensor in synthetic.checkpoint(config, layout).tensors:
        if tensor.name not in cut:
            continue
        size = tensor.shape[-2] // 2
        half = slice(size, 2 * size)
        whole, part = tensor.read(), tensor.start(half).value()
        if isinstance(whole, Quantized):
            expected: Any = whole.change_rows(lambda plane, axis: jax.lax.slice_in_dim(plane, size, 2 * size, axis=axis))  # noqa: B023
        else:
            expected = whole[..., half, :]
        for one, other in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), tensor.name


SHARES = """
import json
import jax
import numpy as np
from jax.sharding import Mesh
from ds4jax.random_models import checkpoint
from pallas_kernels.linear.cut import AXIS

found = {}
for form in ("MXFP4", "IQ2_XXS", "Q2_K", "Q8_0", "BF16"):
    for count in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), (AXIS,))
        made = checkpoint._over.lower(mesh, form, (256, 2048, 4096), 0.01, np.uint32(1)).compile().memory_analysis()
        found.setdefault(form, []).append([made.output_size_in_bytes, made.temp_size_in_bytes])
print(json.dumps(found))
"""


def test_no_device_makes_more_than_its_share() -> None:
    """At the shape of V4-Flash's experts: what the program of a device leaves, and its temporary arrays."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SHARES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 5
    for form, [(whole, _), (part, temporary)] in found.items():
        # Besides some bytes for the list of planes.
        assert (whole // 8 <= part <= whole // 8 + 64, temporary < 64) == (True, True), form
