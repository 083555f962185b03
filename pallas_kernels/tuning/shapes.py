"""The products of V4-Flash that the share-warp kernel computes; one table for tests, tuning and benchmarks."""

from __future__ import annotations

import dataclasses

from pallas_kernels.formats import BLOCK, BLOCK_BYTES


@dataclasses.dataclass(frozen=True)
class Product:
    """One launch: weights of `sizes` rows of K values each, or one weight of `groups` groups of `sizes[0]` rows.

    Attributes:
        name: its name in the model.
    """

    name: str
    sizes: tuple[int, ...]
    k: int
    groups: int = 1

    @property
    def key(self) -> str:
        """The key of this shape in the tile table."""
        return tile_key(self.sizes, self.k, self.groups)

    @property
    def weight_bytes(self) -> int:
        """Bytes of quantised weights that one launch reads."""
        return self.groups * sum(self.sizes) * self.k // BLOCK * BLOCK_BYTES

    def traffic(self, m: int) -> int:
        """Bytes that a launch with m rows must move: weights, quantised activations and float32 results."""
        activations = m * self.groups * self.k * (BLOCK + 4) // BLOCK
        return self.weight_bytes + activations + m * self.groups * sum(self.sizes) * 4


def tile_key(sizes: tuple[int, ...], k: int, groups: int) -> str:
    """`NxK` with the weight rows of a launch, `GxNxK` with several groups."""
    prefix = f"{groups}x" if groups > 1 else ""
    return f"{prefix}{'+'.join(map(str, sizes))}x{k}"


FLASH = (
    Product("q_a + kv", (1024, 512), 4096),
    Product("q_b", (32768,), 1024),
    Product("o_a", (1024,), 4096, groups=8),
    Product("o_b", (4096,), 8192),
    Product("gate + up", (2048, 2048), 4096),
    Product("down", (4096,), 2048),
    Product("e_proj, h_proj", (4096,), 4096),
    Product("head", (129280,), 4096),
)
