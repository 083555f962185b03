"""Layouts of models with random weights: a configuration, and the types of its parameters in a published file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ds4jax.bounds import LAYOUT_NAMES
from ds4jax.config import Config
from ds4jax.loading.dspark_names import Numbers
from ds4jax.loading.gguf_names import DENSE, EMBEDDING, EXPERTS, SMALL, TABLE, VECTOR, Kind, Slot

SMALL_Q2 = Config(
    vocab_size=640,
    dim=256,
    n_layers=6,
    n_heads=4,
    head_dim=128,
    rope_dim=64,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=32,
    window=16,
    n_experts=8,
    n_active=2,
    moe_dim=256,
    n_hash_layers=2,
    compress_ratios=(0, 0, 4, 128, 4, 128, 0),
    original_context=64,
    index_heads=8,
    index_dim=64,
    index_topk=8,
    max_context=4096,
)


# Types of what is no matrix.
_NUMBERS: dict[Kind, str] = {VECTOR: "F32", TABLE: "I32"}


@dataclasses.dataclass(frozen=True)
class Types:
    """Stored types of a file's tensors.

    Attributes:
        names: type by the end of a parameter's name.
        ends: the same for the first and the last layer, where it differs there.
        kinds: type of the other matrices of a kind.
    """

    names: Mapping[str, str]
    ends: Mapping[str, str]
    kinds: Mapping[Kind, str]

    def of(self, slot: Slot, layers: int) -> str:
        """The stored type of a parameter of a model with so many layers."""
        at_an_end = slot.name.startswith(("layers.0.", f"layers.{layers - 1}."))
        for names in (self.ends if at_an_end else {}, self.names):
            for suffix, stored in names.items():
                if slot.name.endswith(suffix):
                    return stored
        return {**_NUMBERS, **self.kinds}[slot.kind]


# The file of an MTP block that has its own.
MTP = Types({}, {}, {DENSE: "Q8_0", EXPERTS: "Q4_K", SMALL: "F32", EMBEDDING: "F32"})
# antirez's two-bit file.
Q2 = Types(
    names={".experts.w1.weight": "IQ2_XXS", ".experts.w3.weight": "IQ2_XXS", ".experts.w2.weight": "Q2_K"},
    ends={},
    kinds={DENSE: "Q8_0", SMALL: "F16", EMBEDDING: "F16"},
)
# unsloth's UD-IQ3_XXS. Which two layers have MXFP4 was not seen.
UD_IQ3_XXS = Types(
    names={
        ".experts.w1.weight": "IQ2_S",
        ".experts.w3.weight": "IQ2_S",
        ".experts.w2.weight": "IQ3_XXS",
        "shared_experts.w1.weight": "Q5_K",
        "shared_experts.w3.weight": "Q5_K",
        "shared_experts.w2.weight": "Q6_K",
        "attn.wq_a.weight": "Q5_K",
        "embed.weight": "Q4_K",
        "head.weight": "Q4_K",
        "ffn.gate.weight": "BF16",
        "compressor.wkv.weight": "Q8_0",
        "compressor.wgate.weight": "Q8_0",
        "indexer.wq_b.weight": "Q8_0",
        "indexer.weights_proj.weight": "Q8_0",
    },
    ends={".experts.w2.weight": "MXFP4"},
    kinds={DENSE: "Q8_0", SMALL: "F32"},
)


# The published checkpoint with FP8 matrices as Q8_0: experts keep their bits. 43 layers are more than any one GPU holds.
PUBLISHED = Types(
    names={"hc_attn_fn": "F32", "hc_ffn_fn": "F32", "hc_head_fn": "F32"},
    ends={},
    kinds={DENSE: "Q8_0", EXPERTS: "MXFP4", SMALL: "BF16", EMBEDDING: "BF16"},
)


# antirez's file of a DSpark drafter, by its size and the types that its reader takes.
DSPARK = Types(
    names={**Q2.names, "ffn.gate.weight": "F32", "confidence.weight": "F32"},
    ends={},
    kinds={DENSE: "Q8_0", SMALL: "F16", EMBEDDING: "Q8_0"},
)
OF_DRAFTERS = {"mtp.": MTP, "dspark.": DSPARK}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model's configuration and the types of its file. MTP block and DSpark drafter always have those of `OF_DRAFTERS`."""

    config: Config
    types: Types

    def stored_type(self, slot: Slot, layers: int) -> str:
        """The stored type of a parameter of a model with so many of the layout's layers."""
        own = next((types for prefix, types in OF_DRAFTERS.items() if slot.name.startswith(prefix)), self.types)
        return own.of(slot, layers)


def with_dspark(config: Config, *, noise_id: int, rank: int) -> Config:
    """The same model with a DSpark drafter of three stages that reads its last three layers."""
    layers, stages = config.n_layers, 3
    numbers = Numbers(stages, block=5, layers=tuple(range(layers - stages, layers)), noise_id=noise_id, rank=rank)
    return dataclasses.replace(config, **numbers.fields, compress_ratios=(*config.layer_ratios, *[0] * stages))


LAYOUTS = dict(
    zip(
        LAYOUT_NAMES,
        (
            Layout(Config(), Q2),
            Layout(SMALL_Q2, Q2),
            Layout(Config(), UD_IQ3_XXS),
            Layout(SMALL_Q2, UD_IQ3_XXS),
            Layout(with_dspark(Config(), noise_id=128799, rank=256), Q2),
            Layout(with_dspark(SMALL_Q2, noise_id=5, rank=32), Q2),
            Layout(Config(), PUBLISHED),
        ),
        strict=True,
    )
)
