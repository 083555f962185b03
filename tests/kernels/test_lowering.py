"""Every kernel lowers for CUDA at every shape that a model asks for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import golden_config

from ds4jax.config import Config
from ds4jax.model.parameters import shapes
from pallas_kernels import ops
from pallas_kernels.core import tiles
from pallas_kernels.formats import BLOCK, HALF, Q8_0
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.q8_matmul import NAME, q8_matmul
from pallas_kernels.tuning.shapes import FLASH, Product

GGUF_A = Config(
    vocab_size=640, dim=256, n_layers=6, n_heads=4, head_dim=128, rope_dim=64, q_lora_rank=64, o_groups=2, o_lora_rank=32,
    window=16, n_experts=8, n_active=2, moe_dim=256, n_hash_layers=2, compress_ratios=(0, 0, 4, 128, 4, 128, 0),
    original_context=64, index_heads=8, index_dim=64, index_topk=8,
)  # fmt: skip
DENSE = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "e_proj", "h_proj", "head", "shared_experts.w1", "shared_experts.w2")


def abstract_weight(n: int, k: int) -> Q8_0:
    quants = jax.ShapeDtypeStruct((2, n, k // BLOCK, HALF), jnp.int32)
    return Q8_0(quants, jax.ShapeDtypeStruct((n, k // BLOCK), jnp.float16))


def lowered(product: Product, rows: int) -> str:
    weights = [abstract_weight(product.groups * n, product.k) for n in product.sizes]
    if product.groups > 1:
        x = jax.ShapeDtypeStruct((rows, product.groups, product.k), jnp.float32)
        call = functools.partial(ops.grouped_matmul, strict=False, implementation="pallas")
        return lowered_for_cuda(jax.jit(call), x, weights[0])
    x = jax.ShapeDtypeStruct((rows, product.k), jnp.float32)
    return lowered_for_cuda(jax.jit(functools.partial(ops.matmul_many, strict=False, implementation="pallas")), x, weights)


def is_dense(name: str) -> bool:
    return name.removesuffix(".weight").endswith(DENSE) and "indexer" not in name and ".experts." not in name


def linear_products(config: Config) -> list[Product]:
    found = {}
    for name, shape in shapes(config).items():
        if is_dense(name):
            groups = config.o_groups if ".wo_a." in name else 1
            found[shape, groups] = Product(name, (shape[0] // groups,), shape[1], groups)
    return list(found.values())


@pytest.mark.long
@pytest.mark.parametrize("rows", [4, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 8))])
@pytest.mark.parametrize("product", FLASH, ids=lambda product: product.key)
def test_v4_flash(product, rows):
    text = lowered(product, rows)
    assert kernel_calls(text, NAME) == 1
    assert kernel_calls(text, "q8_activation") == 1


@pytest.mark.slow
@pytest.mark.parametrize("product", FLASH, ids=lambda product: product.key)
def test_measured_tiles(product):
    """What a GPU runs: this machine's own device has the tiles of the rule."""
    blocks = product.k // BLOCK
    weights = [abstract_weight(product.groups * n, product.k) for n in product.sizes]
    for device, shapes_of in tiles.read(tiles.TABLE).items():
        for m in {tuple(tile): int(m) for m, tile in shapes_of[product.key].items()}.values():
            words = jax.ShapeDtypeStruct((m, product.groups, 2, blocks, HALF), jnp.int32)
            x = Activation(words, jax.ShapeDtypeStruct((m, product.groups, blocks), jnp.float32))
            tile = tiles.tile_for(product.sizes, product.k, product.groups, m, device)
            text = lowered_for_cuda(jax.jit(functools.partial(q8_matmul, tile=tile, groups=product.groups)), x, weights)
            assert kernel_calls(text, NAME) == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [golden_config(), GGUF_A], ids=["a", "gguf"])
def test_golden_models(config):
    for product in linear_products(config):
        assert kernel_calls(lowered(product, 3), NAME) == 1, product.key


def test_twelve_rows_are_two_launches():
    assert kernel_calls(lowered(FLASH[0], 12), NAME) == 2


def test_the_table_of_shapes_is_v4_flash():
    """The products that tests, tuning and benchmarks use are those of the configuration."""
    config = Config()
    found = {(shape[0], shape[1]) for name, shape in shapes(config).items() if is_dense(name)}
    table = {(product.groups * n, product.k) for product in FLASH for n in product.sizes}
    assert found == table
