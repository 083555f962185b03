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
# # 5 · Inside V4
#
# `model.trace(ids)` returns named intermediates of every layer for one sequence. This notebook shows the parts that are new in
# V4: mixing matrices between streams, compressed attention rows, the indexer's choice and the experts. It ends with a logit
# lens over the layers.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import ds4jax
from ds4jax import runtime
from ds4jax.bounds import HELD_OUT_TEXT

runtime.configure()
plt.style.use("plain.mplstyle")
model = ds4jax.load()
config = model.config
ids = model.encode(HELD_OUT_TEXT.read_text("utf-8")[:3000])[:512]
trace = model.trace(ids)
print(trace)

# %% [markdown]
# ## Streams and how they mix
#
# The residual has four streams. A matrix mixes them around every sub-layer. Sinkhorn iterations make this matrix doubly
# stochastic: mass moves between streams and none is lost. In this small model the matrices stay near the identity. The figure
# shows the mean over the text's tokens, around attention:

# %%
combs = trace.over_layers("hc_attn_comb")
figure, panels = plt.subplots(1, config.n_layers, figsize=(7.6, 1.9), sharey=True)
for axes, (index, comb) in zip(panels, combs.items(), strict=True):
    image = axes.imshow(comb.mean(0), vmin=0, vmax=1, cmap="Blues")
    axes.set(title=f"layer {index}", xticks=range(4), yticks=range(4), xlabel="to stream")
    axes.grid(visible=False)
    np.testing.assert_allclose(comb.sum(1), 1, atol=1e-3)
panels[0].set(ylabel="from stream")
figure.colorbar(image, ax=panels, label="share", shrink=0.85)
plt.show()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9))
streams = [trace["embedded"], *trace.over_layers("streams").values()]
for stream in range(config.hc_mult):
    left.plot([np.linalg.norm(h[:, stream], axis=-1).mean() for h in streams], "o-", markersize=3, label=f"stream {stream}")
left.set(xlabel="layers passed (0: the embedding)", ylabel="mean norm", title="Size of the streams", yscale="log")
left.legend(ncols=2, fontsize=8)
taken = np.stack([pre.mean(0) for pre in trace.over_layers("hc_attn_pre").values()])
image = right.imshow(taken.T, aspect="auto", cmap="Blues", vmin=0)
right.set(xlabel="layer", ylabel="stream", title="Share of each stream in attention's input", yticks=range(config.hc_mult))
right.grid(visible=False)
figure.colorbar(image, ax=right, label="weight")
plt.show()

# %% [markdown]
# ## Where attention goes
#
# A query divides its attention between the last 128 tokens, compressed rows of earlier tokens (4 or 128 tokens each), and a
# sink without a value. The three shares sum to one.

# %%
shares = {}
for index, ratio in enumerate(trace.ratios):
    layer = trace.layer(index)
    late = slice(256, None)
    parts = [layer["attn.window_weights"].sum(-1), layer["attn.sink_weights"]]
    parts.insert(1, layer["attn.compressed_weights"].sum(-1) if ratio else np.zeros_like(parts[1]))
    np.testing.assert_allclose(sum(parts), 1, atol=1e-4)
    shares[f"{index}: {f'ratio {ratio}' if ratio else 'window'}"] = [100 * part[late].mean() for part in parts]

figure, axes = plt.subplots(figsize=(7.6, 2.8))
left = np.zeros(len(shares))
for i, (name, colour) in enumerate((("window", "C0"), ("compressed rows", "C1"), ("sink", "0.75"))):
    width = np.array([share[i] for share in shares.values()])
    axes.barh(list(shares), width, left=left, color=colour, label=name)
    left += width
axes.invert_yaxis()
axes.set(xlabel="attention of tokens 256 to 511, mean over heads, %", ylabel="layer", xlim=(0, 100))
axes.grid(axis="y", visible=False)
axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# ## Compressed rows: attention and the indexer's choice
#
# A layer of ratio 4 has a compressed row for every four tokens. Its indexer scores the rows with small queries, and attention
# sees the best 32 of the complete rows. The panels show the score (left), the chosen rows (middle) and attention's weights
# (right).

# %%
layer = trace.layer(1)
score, chosen = layer["attn.indexer.score"], layer["attn.indexer.selected"]
selected = np.zeros(score.shape, bool)
for query, rows in enumerate(chosen):
    selected[query, rows[rows >= 0]] = True
paid = layer["attn.compressed_weights"].mean(1)
assert not paid[~selected].any()

figure, panels = plt.subplots(1, 3, figsize=(7.6, 3.1), sharey=True)
limits = np.nanquantile(score[np.isfinite(score)], (0.02, 0.98))
views = {
    "indexer score": (
        np.where(np.isfinite(score), score, np.nan),
        "viridis",
        np.nanquantile(score[np.isfinite(score)], (0.02, 0.98)),
    ),
    "chosen rows": (np.where(selected, 1.0, np.nan), "Blues", (0, 1.3)),
    "attention, % (log)": (np.log10(100 * np.where(selected, paid, np.nan) + 1e-3), "magma", (-3, 1)),
}
for axes, (name, (picture, colours, limits)) in zip(panels, views.items(), strict=True):
    image = axes.imshow(picture, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set(title=name, xlabel="compressed row")
    axes.grid(visible=False)
    if name != "chosen rows":
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="" if "log" in name else "no unit")
        if "log" in name:
            bar.set_ticks([-3, -2, -1, 0, 1], labels=["0.001", "0.01", "0.1", "1", "10"])
panels[0].set(ylabel="query, token")
plt.show()

# %% [markdown]
# ## Experts
#
# A table of token ids routes layer 0; scores route the other layers. The load is even if each expert serves an eighth of the
# choices. The routers' biases were trained for this.

# %%
load = np.stack([np.bincount(c.ravel(), minlength=config.n_experts) / c.size for c in trace.over_layers("ffn.chosen").values()])
figure, axes = plt.subplots(figsize=(7.6, 2.7))
image = axes.imshow(100 * load, cmap="PuOr_r", vmin=0, vmax=200 / config.n_experts, aspect="auto")
for (row, column), share in np.ndenumerate(100 * load):
    axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
axes.set(xlabel="expert", ylabel="layer", title="Share of the choices, %", xticks=range(config.n_experts))
axes.grid(visible=False)
figure.colorbar(image, ax=axes, label="% (white: even)")
plt.show()
np.testing.assert_allclose(load.sum(1), 1, atol=1e-6)

# %% [markdown]
# ## Logit lens
#
# The head can read the streams after any layer, not only after the last. How good is the prediction there? The figure shows the
# median surprise at the true next token, and how often the most likely token equals the last layer's.

# %%
network = nnx.merge(model.graph, model.weights)
read = jax.jit(lambda h: jax.nn.log_softmax(network.logits(h)))
lens = [np.asarray(read(h)) for h in streams]
bits = [-np.median(log_p[np.arange(len(ids) - 1), ids[1:]]) / np.log(2) for log_p in lens]
final = lens[-1].argmax(-1)
agreed = [100 * (log_p.argmax(-1) == final).mean() for log_p in lens]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.8))
left.plot(bits, "o-")
left.set(xlabel="layers passed (0: the embedding)", ylabel="median surprise, bits", title="What the head reads", ylim=(0, None))
right.plot(agreed, "o-", color="C2")
right.set(xlabel="layers passed (0: the embedding)", ylabel="same token as the last layer, %", ylim=(0, 103), title="Agreement")
plt.show()
assert bits[-1] < bits[0]
np.testing.assert_allclose(lens[-1], jax.nn.log_softmax(trace["logits"]), atol=1e-3)

# %%
first, words = 40, 14
names = [model.tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") for token in range(config.vocab_size)]
figure, axes = plt.subplots(figsize=(7.6, 2.9))
confidence = np.stack([100 * np.exp(log_p[first : first + words].max(-1)) for log_p in lens])
image = axes.imshow(confidence, cmap="Greens", vmin=0, vmax=120, aspect="auto", origin="lower")
for row, log_p in enumerate(lens):
    for column in range(words):
        axes.text(column, row, names[log_p[first + column].argmax()], ha="center", va="center", fontsize=7)
axes.set_xticks(range(words), [names[ids[first + column + 1]] for column in range(words)], fontsize=8)
axes.set(xlabel="true next token", ylabel="layers passed", title="Most likely next token, as the head reads it")
axes.grid(visible=False)
figure.colorbar(image, ax=axes, label="its probability, %", ticks=[0, 50, 100])
plt.show()
