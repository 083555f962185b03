"""What the kernel tests share."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import GOLDEN


@pytest.fixture(scope="session")
def activation_golden() -> dict[str, np.ndarray]:
    """Arithmetic with quantised activations, as tests/golden/README.md describes it."""
    with np.load(GOLDEN / "gguf" / "activation_quant.npz") as file:
        return {key: file[key] for key in file.files if key.startswith("q8_0.")}
