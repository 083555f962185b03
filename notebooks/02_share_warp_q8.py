# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · The share-warp kernel and Q8_0
#
# Decode multiplies a few rows by very large matrices, so its speed is the speed of reading weights. Q8_0 stores a weight in 8.5
# bits. The share-warp kernel reads each block once for all rows of a verify step. This notebook shows the format, the kernel's
# arithmetic step by step, its bits, and the bytes that it reads.

# %%
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from ds4jax import runtime
from pallas_kernels import ops
from pallas_kernels.formats import Q8_0
from pallas_kernels.linear import activation
from pallas_kernels.linear.q8_matmul import Tile, q8_matmul
from pallas_kernels.tuning.shapes import FLASH

runtime.configure()
plt.style.use("plain.mplstyle")
random = np.random.default_rng(0)

# %% [markdown]
# ## The format
#
# 32 values along K share one float16 scale: `w = scale · quant` with int8 quants, 34 bytes for 32 values. On the device, the
# eight words of a block are stored in two halves of four, so that a lane loads 16 bytes at once.

# %%
N, K = 64, 2048
weight = random.standard_normal((N, K)).astype(np.float32) / np.sqrt(K)
stored = Q8_0.quantize(weight)
print(f"float32 {weight.nbytes:,} bytes, Q8_0 {stored.nbytes:,} bytes, {8 * stored.nbytes / weight.size} bits a value")
print(f"quants {stored.quants.dtype}{list(stored.quants.shape)}: [half, N, K/32, words of four int8]")
print(f"scales {stored.scales.dtype}{list(stored.scales.shape)}: [N, K/32]")

# %%
error = (np.asarray(stored.dequantize()) - weight).reshape(N, K // 32, 32)
step_size = np.asarray(stored.scales, np.float32)
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9))
left.hist((error / step_size[..., None]).ravel(), bins=60)
left.set(xlabel="error, steps of the block's scale", ylabel="values", title="Error of each value")
right.hist(np.linalg.norm(error, axis=-1).ravel() / np.linalg.norm(weight.reshape(error.shape), axis=-1).ravel() * 100, bins=40)
right.set(xlabel="relative error of a block, %", ylabel="blocks", title="Error of each block")
plt.show()
assert np.abs(error / step_size[..., None]).max() < 0.57

# %% [markdown]
# The error is at most half a step, and a little more for the largest values of a block, because the scale is rounded to
# float16.
#
# ## The kernel, step by step
#
# 1. Activations are also quantised to int8 in blocks of 32, with a float32 scale.
# 2. A warp owns weight rows. Lane *l* owns their blocks *l*, *l* + 32, *l* + 64, …
# 3. For each of its blocks, a lane computes the **exact** integer dot product with every row of the activations (dp4a: four int8
#    products and their sum in one instruction). It adds `dot · (scale · scale)` to that row's sum with one fused multiply-add.
# 4. The sums of the 32 lanes are added once, at the end.
#
# The same in NumPy, for one weight row and one row of activations:

# %%
LANES = 32
x = random.standard_normal((8, K)).astype(np.float32)
quantised = activation.quantize(jnp.asarray(x), 1, interpret=True)
# From two halves of four words of four bytes, the layout of the weights, back to blocks of 32.
x_quants = np.asarray(quantised.quants)[0, 0].transpose(1, 0, 2).copy().view(np.int8).reshape(K // 32, 32)
x_scales = np.asarray(quantised.scales)[0, 0]
w_quants, w_scales = np.asarray(stored.blocks())[0], np.asarray(stored.scales, np.float32)[0]

dots = np.sum(w_quants.astype(np.int32) * x_quants.astype(np.int32), axis=-1)  # step 3: one exact integer per block
lanes = np.zeros(LANES, np.float64)
for block, dot in enumerate(dots):
    lanes[block % LANES] = np.float32(lanes[block % LANES] + np.float64(dot) * np.float64(w_scales[block] * x_scales[block]))
kernel = q8_matmul(quantised, [stored], tile=Tile(), interpret=True)[0]
print(f"by hand {lanes.sum():.6f}, kernel {float(kernel[0, 0]):.6f}, float32 product {float(x[0] @ weight[0]):.6f}")
assert abs(lanes.sum() - float(kernel[0, 0])) < 1e-5

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9), width_ratios=(2, 1))
left.bar(range(len(dots)), dots, color=[f"C{block // LANES}" for block in range(len(dots))])
left.set(
    xlabel="block of the row (a colour is one turn of the warp)", ylabel="integer dot product", title="Step 3: exact integers"
)
right.bar(range(LANES), lanes, color="C2")
right.set(xlabel="lane", ylabel="sum of its blocks", title="Step 4: 32 sums, added once")
plt.show()

# %% [markdown]
# ## The bits do not depend on the number of rows
#
# Neither order of summation depends on M. So row *m* of a call with M rows has the bits of the same row alone, with any tile,
# and plain decode can be compared with speculative decode bit by bit. (Here the kernel runs in Pallas' interpreter. The tests
# and the benchmark below make the same comparison on a GPU.)

# %%
alone = [np.asarray(q8_matmul(activation.quantize(x[m : m + 1], 1, interpret=True), [stored], tile=Tile(), interpret=True)[0])
         for m in range(8)]  # fmt: skip
compared = 0
for rows in (2, 3, 4, 8):
    for tile in (Tile(1, 1), Tile(2, 2)):
        many = q8_matmul(activation.quantize(x[:rows], 1, interpret=True), [stored], tile=tile, interpret=True)[0]
        for m in range(rows):
            np.testing.assert_array_equal(np.asarray(many)[m].view(np.int32), alone[m][0].view(np.int32))
            compared += N
print(f"{compared:,} values, all bits equal")

# %% [markdown]
# Without CUDA the model uses the same arithmetic in jnp. There the compiler chooses the order of the sums, so the results agree
# up to rounding.

# %%
there = np.asarray(ops.matmul(jnp.asarray(x), stored, strict=False))
exact = np.asarray(ops.matmul(jnp.asarray(x), stored, strict=True))
print(f"jnp path against kernel {np.abs(there - np.concatenate(alone)).max():.1e}, ", end="")
print(f"rounding of activations against strict {np.abs(there - exact).max():.1e}, values of size {exact.std():.2f}")
assert np.abs(there - np.concatenate(alone)).max() < 1e-5

# %% [markdown]
# ## Where the bytes go
#
# The figure shows the products of V4-Flash that the kernel serves. Nearly all bytes are weights, with one row and with eight,
# so the second row is almost free.

# %%
products = sorted(FLASH, key=lambda product: product.weight_bytes)
names = [product.name for product in products]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.0), width_ratios=(3, 2))
left.barh(names, [product.weight_bytes / 1e6 for product in products])
left.set(xscale="log", xlabel="megabytes of weights a launch (logarithmic)", title="What a launch reads", xlim=(1, 1000))
for rows, colour in ((1, "C2"), (8, "C1")):
    share = [100 * (1 - product.weight_bytes / product.traffic(rows)) for product in products]
    right.plot(share, names, "o", color=colour, label=f"{rows} row{'s' * (rows > 1)}")
right.set(xlabel="activations and results, % of all bytes", title="What is not weights", xlim=(0, None))
right.tick_params(labelleft=False)
right.legend()
plt.show()

# %% [markdown]
# ## Roofline, measured
#
# Kernel times from the profiler on an H100 and an H200 (`ds4jax bench suite --part kernels`, files in `benchmarks/results`). A
# launch with M rows makes 2·M operations for each weight. The line is the limit by the copy bandwidth of the same run. Points
# on the line are limited by memory only. Small matrices are below it, because a launch also has a fixed latency.

# %%
traffic = {product.key: product for product in FLASH}
figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.6), sharey=True)
for axes, name in zip(panels, ("nvidia-h100-80gb-hbm3", "nvidia-h200"), strict=True):
    results = json.loads(Path(f"../benchmarks/results/{name}-kernels.json").read_text())
    rows = [row for row in results["rows"] if row["kind"] == "share_warp" and row["m"] <= 8]
    for key in ("129280x4096", "32768x1024", "4096x8192", "2048+2048x4096", "1024+512x4096"):
        product, mine = traffic[key], [row for row in rows if row["shape"] == key]
        operations = [2 * row["m"] * product.weight_bytes / 34 * 32 for row in mine]
        intensity = [o / product.traffic(row["m"]) for o, row in zip(operations, mine, strict=True)]
        speed = [o / row["us"] / 1e6 for o, row in zip(operations, mine, strict=True)]
        axes.plot(intensity, speed, "o-", markersize=4, linewidth=1, label=f"{product.name}  {key}")
    line = np.array([1.5, 17])
    axes.plot(line, line * results["copy_gbps"] / 1e3, "k--", linewidth=1, label="copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte moved", title=results["device"][:11])
    axes.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    axes.minorticks_off()
    axes.text(0.97, 0.05, f"copy {results['copy_gbps']:,.0f} GB/s", transform=axes.transAxes, ha="right")
panels[0].set(ylabel="tera-operations a second")
panels[0].set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()
assert all(row["differing"] == 0 for row in results["bits"])
