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
# # 3 · Strict and lossless
#
# Speculative decode verifies several tokens in one forward pass. The output stays the same only if a row of a larger call has
# the bits of that row alone. Ordinary matrix products do not guarantee this. This notebook shows the difference, the two ways
# in which ds4jax gives the guarantee, and a test for your own machine.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import ds4jax
from ds4jax import runtime
from pallas_kernels import ops
from pallas_kernels.formats import Q8_0

runtime.configure()
plt.style.use("plain.mplstyle")
random = np.random.default_rng(0)

# %% [markdown]
# ## The order of a sum changes its value
#
# A float32 sum depends on its order. A matrix library chooses the order by the shape of the product: with more rows it takes
# wider tiles, splits K differently, or changes from a matrix-vector routine to a matrix-matrix routine.

# %%
values = random.standard_normal(4096).astype(np.float32)
orders = {
    "left to right": np.cumsum(values, dtype=np.float32)[-1],
    "in pairs": values.sum(dtype=np.float32),
    "32 lanes, then their sum": values.reshape(-1, 32).sum(0, dtype=np.float32).sum(dtype=np.float32),
    "exact": values.astype(np.float64).sum(),
}
for name, total in orders.items():
    print(f"{name:<26} {total:.7f}")

# %% [markdown]
# ## The bit-diff matrix
#
# For each number of rows M and each row m, the matrix shows the share of outputs of row m that differ in any bit from the same
# row computed alone. There are three ways to multiply: a plain float32 product of M rows, the quantised product of decode
# (share-warp arithmetic), and the strict product, which always pads to one row count before it calls the library.

# %%
N, K, MAX_ROWS = 512, 1024, 8
dense = jnp.asarray(random.standard_normal((N, K)), jnp.float32) / np.float32(np.sqrt(K))
stored = Q8_0.quantize(dense)
x = jnp.asarray(random.standard_normal((MAX_ROWS, K)), jnp.float32)
plain = jax.jit(lambda x: jnp.dot(x, dense.T, precision="highest"))
ways = {
    "jnp.dot": plain,
    "decode, Q8_0": jax.jit(lambda x: ops.matmul(x, stored, strict=False)),
    "strict": jax.jit(lambda x: ops.matmul(x, stored, strict=True)),
}


def differing(multiply) -> np.ndarray:
    """Share of outputs in % that differ from the row alone, [M, m]; NaN for a row that the call does not have."""
    alone = np.concatenate([multiply(x[m : m + 1]) for m in range(MAX_ROWS)]).view(np.int32)
    found = np.full((MAX_ROWS, MAX_ROWS), np.nan)
    for rows in range(1, MAX_ROWS + 1):
        together = np.asarray(multiply(x[:rows])).view(np.int32)
        found[rows - 1, :rows] = 100 * (together != alone[:rows]).mean(-1)
    return found


matrices = {name: differing(multiply) for name, multiply in ways.items()}
for name, matrix in matrices.items():
    print(f"{name:<14} {np.nanmax(matrix):5.1f} % of a row's values differ at worst")

# %%
figure, panels = plt.subplots(1, 3, figsize=(7.6, 3.1), sharey=True)
for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
    extent = (0.5, MAX_ROWS + 0.5, 0.5, MAX_ROWS + 0.5)
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="magma_r", origin="lower", extent=extent)
    axes.set(xlabel="row m", title=name, xticks=range(1, MAX_ROWS + 1))
    axes.grid(visible=False)
panels[0].set(ylabel="rows in the call, M", yticks=range(1, MAX_ROWS + 1))
figure.colorbar(image, ax=panels, label="values that differ\nfrom the row alone, %", shrink=0.9)
plt.show()
assert np.nanmax(matrices["strict"]) == 0

# %% [markdown]
# The middle panel depends on the machine. On CUDA, the decode product is the share-warp kernel, whose rows do not depend on
# each other. Elsewhere it is the same arithmetic in jnp. The loop of ds4jax does not rely on this: **a step always has the same
# number of rows**, live or not, and plain decode is the same compiled program at depth 0.
#
# ## What strict guarantees
#
# `strict=True` multiplies float32 values with `jnp.dot` at one fixed row count, also in the experts, and its program contains
# no Pallas kernel. So it is the reference for the fast path: different arithmetic, no quantised activations, the same
# guarantee.

# %%
model = ds4jax.load(max_draft=1)
prompt = "And it came to pass"
results = {
    (draft, strict): model.generate(prompt, max_new_tokens=48, draft=draft, strict=strict)
    for strict in (False, True)
    for draft in (0, 1)
}
for (draft, strict), result in results.items():
    print(
        f"{'strict' if strict else 'default':<8} draft {draft}  {result.steps} steps, {result.tokens_per_step:.2f} tokens a step"
    )
for strict in (False, True):
    plain, drafted = results[0, strict], results[1, strict]
    assert drafted.ids == plain.ids
    np.testing.assert_array_equal(drafted.fingerprints, plain.fingerprints)
print("tokens and fingerprints of drafting and plain decode: equal in both modes")
print(repr(results[1, False].text))

# %% [markdown]
# ## Fingerprints
#
# Each token has a fingerprint of its logits: the sum and the exclusive or of their bits. Equal tokens can hide a difference
# that is still too small to change a token. Equal fingerprints cannot.

# %%
default, strict = results[0, False], results[0, True]
pairs = {
    "drafting against plain,\nsame mode": (results[1, False], default),
    "strict drafting against\nstrict plain": (results[1, True], strict),
    "strict against default": (strict, default),
}
marks = []
for left, right in pairs.values():
    same_bits = (left.fingerprints[:48] == right.fingerprints[:48]).all(-1)
    same_token = np.array(left.ids) == np.array(right.ids)
    marks.append(np.where(same_bits, 2, np.where(same_token, 1, 0)))
colours = ListedColormap(["#d55e00", "#e8c468", "#0072b2"])
figure, axes = plt.subplots(figsize=(7.6, 2.1))
image = axes.imshow(marks, cmap=colours, vmin=-0.5, vmax=2.5, aspect="auto", interpolation="none")
axes.hlines([0.5, 1.5], -0.5, 47.5, color="white", linewidth=3)
axes.set(xlabel="new token", title="The same token? The same bits?")
axes.set_yticks(range(len(pairs)), pairs)
axes.grid(visible=False)
bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2])
bar.ax.set_yticklabels(["other token", "same token,\nother bits", "same bits"])
plt.show()

# %% [markdown]
# The strict and the default mode use different arithmetic, so their bits differ from the first token, and sooner or later a
# token differs. The guarantee holds within each mode, so the two modes are not compared.
#
# ## Test it on your machine
#
# `ds4jax check` (or `model.check()`) compares every depth with depth 0 in both modes, on prompts of three lengths. Its exit
# code is 1 if a comparison differs. Here it runs with one prompt:

# %%
report = model.check(prompt)
print(report)
assert report.equal
