"""Hyper-parameters of a DeepSeek-V4 model; all shapes derive from them."""

from __future__ import annotations

import dataclasses

CACHES = ("float32", "narrow")


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyper-parameters of one model; the defaults are V4-Flash's.

    Hashable, so that it can be a static argument of a jitted function.

    Attributes:
        compress_ratios: one entry a layer and then one for each MTP layer. 0 attends to the window alone, 4 adds overlapping
            compressed rows chosen by the indexer, any other ratio adds plain compressed rows.
        n_hash_layers: number of first layers that choose experts by token id from a table.
        n_mtp: 1 if the weights hold an MTP block, else 0.
        n_dspark: number of DSpark stages of the weights; 0 without that drafter, and then its other fields mean nothing.
        dspark_block: drafts of one DSpark block.
        dspark_layers: main layers whose output DSpark reads, counted from 0.
        dspark_noise_id: token that stands for an unknown one in a DSpark block.
        dspark_rank: width of DSpark's Markov tables.
        qat: simulate the rounding of rows to FP8 and of indexer keys to FP4 that published weights were trained with.
        cache: type of stored compressed rows and indexer keys: "float32", or "narrow" for the FP8 and FP4 that qat rounds them
            to. Both give the same bits.

    Raises:
        ValueError: a field with an impossible value; the message names it.

    Source: `inference/config.json` and `config.json` of the V4-Flash checkpoint.
    """

    vocab_size: int = 129280
    dim: int = 4096
    n_layers: int = 43
    n_heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    window: int = 128
    n_experts: int = 256
    n_active: int = 6
    moe_dim: int = 2048
    n_hash_layers: int = 3
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    compress_ratios: tuple[int, ...] = (0, 0) + (4, 128) * 20 + (4, 0)
    n_mtp: int = 1
    n_dspark: int = 0
    dspark_block: int = 5
    dspark_layers: tuple[int, ...] = (40, 41, 42)
    dspark_noise_id: int = 128799
    dspark_rank: int = 256
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    original_context: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_iters: int = 20
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    max_context: int = 1048576
    bos_id: int = 0
    eos_id: int = 1
    qat: bool = True
    cache: str = "float32"

    def __post_init__(self) -> None:
        may_be_zero = {"n_hash_layers", "n_mtp", "n_dspark", "dspark_noise_id", "bos_id", "eos_id", "qat"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and field.name not in may_be_zero and not value > 0:
                raise ValueError(f"{field.name} is {value}; it must be above 0")
        for name, token in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} is {token}; it must be below vocab_size ({self.vocab_size})")
        if self.n_mtp not in (0, 1):
            raise ValueError(f"n_mtp is {self.n_mtp}; models have at most one MTP block")
        if len(self.compress_ratios) < self.n_layers + self.n_mtp:
            needed = self.n_layers + self.n_mtp
            raise ValueError(f"compress_ratios has {len(self.compress_ratios)} entries; layers and MTP block need {needed}")
        for ratio in self.compress_ratios:
            if ratio < 0 or ratio == 1:
                raise ValueError(f"compress_ratios holds {ratio}; a ratio is 0 or at least 2")
        parts = (("o_groups", "n_heads"), ("n_active", "n_experts"), ("rope_dim", "head_dim"), ("rope_dim", "index_dim"))
        for part, total in parts:
            if getattr(self, part) > getattr(self, total):
                raise ValueError(f"{part} is {getattr(self, part)}, more than {total} ({getattr(self, total)})")
        if self.n_heads % self.o_groups:
            raise ValueError(f"o_groups is {self.o_groups}, which does not divide n_heads ({self.n_heads})")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}; rotation needs pairs")
        if self.index_dim & (self.index_dim - 1):
            raise ValueError(f"index_dim is {self.index_dim}; the indexer's Hadamard transform needs a power of two")
        if self.n_hash_layers > self.n_layers:
            raise ValueError(f"n_hash_layers is {self.n_hash_layers}, more than n_layers ({self.n_layers})")
        self._check_dspark()
        self._check_cache()

    def _check_dspark(self) -> None:
        if not self.n_dspark:
            return
        if not 0 <= self.dspark_noise_id < self.vocab_size:
            raise ValueError(f"dspark_noise_id is {self.dspark_noise_id}; it must be below vocab_size ({self.vocab_size})")
        if not self.dspark_layers or any(not 0 <= layer < self.n_layers for layer in self.dspark_layers):
            raise ValueError(f"dspark_layers is {list(self.dspark_layers)}; it must name layers below n_layers ({self.n_layers})")

    def _check_cache(self) -> None:
        if self.cache not in CACHES:
            raise ValueError(f"cache is {self.cache!r}; it must be one of {', '.join(CACHES)}")
        if self.cache != "narrow":
            return
        if not self.qat:
            raise ValueError(
                "cache is narrow, but qat is off: FP8 and FP4 lose what is not rounded to them; turn qat on or use float32"
            )
        plain = self.head_dim - self.rope_dim
        if plain % 64 or self.index_dim % 32:
            raise ValueError(
                f"cache is narrow, but head_dim - rope_dim ({plain}) is no multiple of 64 or index_dim ({self.index_dim}) "
                "none of 32, the blocks of FP8 and FP4; use float32"
            )

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each main layer, [L]."""
        return self.compress_ratios[: self.n_layers]

    @property
    def mtp_ratio(self) -> int:
        """Compression ratio of the MTP block."""
        return self.compress_ratios[self.n_layers]

    @property
    def hc_mixes(self) -> int:
        """Rows of a hyper-connection function: pre and post weights and the mixing matrix of the streams."""
        return (2 + self.hc_mult) * self.hc_mult
