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
# # 1 · Load and generate
#
# The package contains a trained DeepSeek-V4 with 7.6 million parameters. It has every part of V4-Flash, so the code that runs
# here on a laptop is the code that runs the 284B model. This notebook loads it, generates text, and looks into its file.

# %%
import collections

import matplotlib.pyplot as plt
import numpy as np

import ds4jax
from ds4jax import runtime
from ds4jax.loading import open_checkpoint

runtime.configure()  # keeps compiled programs for the next process
plt.style.use("plain.mplstyle")

model = ds4jax.load(max_draft=2)
config = model.config
print(f"{config.n_layers} layers of width {config.dim}, {config.n_experts} experts, vocabulary of {config.vocab_size}")
print("tokens in a compressed row, by layer:", config.layer_ratios, "(0: window alone)")

# %% [markdown]
# ## Generate
#
# The first call compiles one program that drafts, verifies and accepts. Later calls with the same buffers reuse it.

# %%
first = model.generate("In the beginning", max_new_tokens=64)
again = model.generate("In the beginning", max_new_tokens=64)
print(first.text)
print(f"\nfirst call {first.seconds:.1f} s with compilation, the same call again {again.seconds:.2f} s")
assert first.ids == again.ids

# %% [markdown]
# The result contains the figures of the run. Each step of the loop verifies up to `draft` tokens of the MTP block and adds one
# token of the model, so there are more tokens than steps.

# %%
print(f"{len(again.ids)} tokens in {again.steps} steps, {again.tokens_per_step:.2f} a step; ended by {again.finish_reason}")
print(f"{again.tokens_per_second:.0f} tokens/s, {again.ms_per_step:.1f} ms a step")
print("drafts that stood, by depth:", ", ".join(f"{share:.0%}" for share in again.acceptance))

# %% [markdown]
# ## Stream
#
# `model.stream` yields lists of new ids; the caller may stop at any time. Sampling is one of the options.

# %%
sampling = ds4jax.Sampling(temperature=0.7, top_p=0.9, seed=1)
text, pieces = model.tokenizer.stream(), []
for ids in model.stream("The LORD is my", max_new_tokens=48, sampling=sampling):
    pieces.append(text.push(ids))
print(" | ".join(piece.replace("\n", "\\n") for piece in pieces))

# %% [markdown]
# ## Score
#
# `model(ids)` returns the logits of all positions. The figure shows the bits that each token of a sentence costs the model.
# Text that it has learnt by heart costs few bits; an unexpected word costs many.

# %%
sentence = "And the LORD said unto Moses, Go unto Pharaoh, and say unto him, Buy a bicycle."
ids = model.encode(sentence)
logits = np.asarray(model(ids), np.float64)
log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
bits = -log_p[np.arange(len(ids) - 1), ids[1:]] / np.log(2)
names = [model.tokenizer.decode([token]).replace(" ", "·") for token in ids[1:]]

figure, axes = plt.subplots(figsize=(7.6, 2.8))
axes.bar(range(len(bits)), bits, color=["C1" if b > 8 else "C0" for b in bits])
axes.axhline(np.log2(config.vocab_size), color="0.5", linewidth=0.8, linestyle="--")
axes.text(0, np.log2(config.vocab_size) + 0.2, f"all {config.vocab_size} tokens equally likely", color="0.4")
axes.set_xticks(range(len(bits)), names, rotation=60, ha="right", rotation_mode="anchor")
axes.set(xlabel="token (a dot is a space)", ylabel="surprise, bits", title="Surprise at each token")
axes.grid(axis="x", visible=False)
plt.show()
assert bits[-4:].max() > 8 > bits[:6].max()

# %% [markdown]
# ## What a GGUF holds
#
# A GGUF file holds metadata (configuration, tokenizer, record of the training) and tensors. Opening it reads only the headers
# and checks every name, type and shape against the configuration. This is fast for a file of any size.

# %%
checkpoint = open_checkpoint(model.path)
for key in ("general.architecture", "general.name", "deepseek4.block_count", "deepseek4.attention.sliding_window"):
    print(f"{key:<36} {checkpoint.metadata.get(key)}")
print(f"\n{len(checkpoint.tensors)} tensors, {sum(tensor.nbytes for tensor in checkpoint.tensors) / 1e6:.1f} MB, for example")
for tensor in checkpoint.tensors[:4]:
    print(f"  {tensor.name:<36} {tensor.stored:<5} {list(tensor.shape)}")

# %%
PARTS = {
    "ffn.experts": "routed experts",
    "ffn.shared_experts": "shared experts",
    "attn.indexer": "indexers",
    "attn.compressor": "compressors",
    "attn.": "attention",
    "hc_": "hyper-connections",
    "embed": "embedding",
    "head": "head",
}


def part(name: str) -> str:
    """The part of the model that contains a tensor."""
    if name.startswith("mtp"):
        return "MTP block"
    return next((title for prefix, title in PARTS.items() if prefix in name), "norms, routers")


sizes: collections.Counter[tuple[str, str]] = collections.Counter()
for tensor in checkpoint.tensors:
    sizes[part(tensor.name), tensor.stored] += tensor.nbytes
parts = sorted({name for name, _ in sizes}, key=lambda name: sum(size for key, size in sizes.items() if key[0] == name))
kinds = sorted({kind for _, kind in sizes}, key=lambda kind: -sum(size for key, size in sizes.items() if key[1] == kind))

figure, axes = plt.subplots()
left = np.zeros(len(parts))
for kind in kinds:
    width = np.array([sizes[name, kind] / 1e6 for name in parts])
    axes.barh(parts, width, left=left, label=kind)
    left += width
axes.set(xlabel="megabytes in the file", title="Where the bytes of tiny.gguf are, by stored type")
axes.grid(axis="y", visible=False)
axes.legend(title="stored as", loc="lower right")
plt.show()
