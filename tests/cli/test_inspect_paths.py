"""What `inspect` says of a decode step: which blocks kernels run, why others do not, and what types cost."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ds4jax.cli import inspect_paths
from ds4jax.random_models import checkpoint as synthetic


def test_decode_step_of_the_published_types() -> None:
    checkpoint = synthetic.checkpoint(synthetic.config_of("flash-q2", 5), "flash-q2")
    (layers, mtp, head) = inspect_paths.decode_step(checkpoint)
    kernels = {"rows": 64, "cuda": "kernels", "default": "modules", "reason": "widths and types fit"}
    assert layers == {"part": "layers", "layers": "0-4", "count": 5, **kernels}
    assert mtp == {"part": "mtp", "layers": "mtp", "count": 1, **kernels}
    assert head == {"part": "head", "layers": "", "count": 1, **kernels}
    assert inspect_paths.costs(checkpoint) == []


def test_experts_of_a_prompt() -> None:
    whole = synthetic.checkpoint(synthetic.config_of("flash-q2", 3), "flash-q2")
    paths = {"hopper": "stored", "cuda": "dequantised", "default": "every row", "reason": "widths and types fit"}
    layers = {"part": "layers", "layers": "0-2", "count": 3, **paths}
    mtp = {"part": "mtp", "layers": "mtp", "count": 1, **paths}
    assert inspect_paths.prompt_experts(whole) == [layers, mtp]
    name = "layers.1.ffn.experts.w2.weight"

    def changed(form: str) -> list[dict]:
        tensors = tuple(dataclasses.replace(one, form=form) if one.name == name else one for one in whole.tensors)
        return inspect_paths.prompt_experts(dataclasses.replace(whole, tensors=tensors))

    around = [{**layers, "layers": "0, 2", "count": 2}, mtp]
    reason = "ffn.experts.w2 is Q8_0, which the products do not decode"
    one = {**layers, "layers": "1", "count": 1, "hopper": "dequantised", "reason": reason}
    assert changed("Q8_0") == [around[0], one, mtp]
    reason = "ffn.experts.w2 is IQ1_S, which has no kernel"
    assert changed("IQ1_S") == [around[0], one | {"hopper": "every row", "cuda": "every row", "reason": reason}, mtp]


@pytest.mark.parametrize(
    ("name", "form", "reasons"),
    [
        (
            "layers.1.attn.wq_b.weight",
            "BF16",
            {"0, 2": None, "1": "attn.wq_b is bfloat16, which has no kernel", "mtp": None, "": None},
        ),
        (
            "mtp.0.ffn.experts.w2.weight",
            "F32",
            {"0-2": None, "mtp": "ffn.experts.w2 is float32, which has no kernel", "": None},
        ),
        ("head.weight", "F16", {"0-2": None, "mtp": None, "": "head is float16, which has no kernel"}),
    ],
)
def test_decode_step_say_why_not(name: str, form: str, reasons: dict[str, str | None]) -> None:
    """The type on the device of one weight of a block decides for the whole of it, and for no other."""
    whole = synthetic.checkpoint(synthetic.config_of("small-q2", 3), "small-q2")
    tensors = tuple(dataclasses.replace(one, form=form) if one.name == name else one for one in whole.tensors)
    rows = inspect_paths.decode_step(dataclasses.replace(whole, tensors=tensors))
    assert [row["layers"] for row in rows] == list(reasons)
    for row in rows:
        reason = reasons[row["layers"]]
        assert (row["cuda"], row["reason"]) == ("modules" if reason else "kernels", reason or "widths and types fit")


def test_costs_of_types_without_kernel_and_of_small_matrices() -> None:
    whole = synthetic.checkpoint(synthetic.config_of("small-q2", 3), "small-q2")
    config = whole.config
    down = next(one for one in whole.tensors if one.name == "layers.1.ffn.experts.w2.weight")
    indexer = next(one for one in whole.tensors if one.name == "layers.2.attn.indexer.wq_b.weight")
    values, numbers = math.prod(down.shape), math.prod(indexer.shape)
    changed = {
        down.name: dataclasses.replace(down, stored="IQ1_S", form="IQ1_S", device_nbytes=values // 256 * 50),
        indexer.name: dataclasses.replace(
            indexer, stored="Q8_0", form="F32", nbytes=numbers // 32 * 34, device_nbytes=4 * numbers
        ),
    }
    tensors = tuple(changed.get(one.name, one) for one in whole.tensors)
    share = config.n_active / config.n_experts
    assert inspect_paths.costs(dataclasses.replace(whole, tensors=tensors)) == [
        {
            "kind": "experts down",
            "stored": "IQ1_S",
            "why": "no kernel",
            "read": values // 256 * 50 * share,
            "expanded": 4 * values * share,
            "layers": "1",
        },
        {
            "kind": "indexer",
            "stored": "Q8_0",
            "why": "float32 in memory",
            "read": 4 * numbers,
            "expanded": 4 * numbers - numbers // 32 * 34,
            "layers": "2",
        },
    ]
