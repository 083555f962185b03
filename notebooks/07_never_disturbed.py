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
# # 7 · A batch that never disturbs you
#
# A server computes many requests in one batch. In most engines the other requests change the order of sums, so the same request
# can get another text when the server is busy, even at temperature 0. An engine of ds4jax gives each request the bits that it has
# alone. This notebook sends one request alone, in a crowd, between cancelled neighbours, and with its prompt from the prefix
# cache, and compares every token and every fingerprint.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import ds4jax
from ds4jax import runtime
from ds4jax.bounds import HELD_OUT_TEXT

runtime.configure()
plt.style.use("plain.mplstyle")
model = ds4jax.load(max_draft=1)
NEW_TOKENS = 48


def engine() -> ds4jax.Engine:
    """A new engine: four requests run at once, prompts are appended in calls of 32 tokens."""
    return ds4jax.Engine(model, slots=4, context=256, chunk=32)


# %% [markdown]
# ## Alone
#
# Two requests, each alone in a new engine: a greedy one, and one that samples with a seed. Their prompt has 80 tokens. A
# fingerprint of a token is a digest of the logits from which it was chosen.

# %%
held_out = HELD_OUT_TEXT.read_text("utf-8")
PROMPT = model.encode(held_out[:600])[:80]
GREEDY = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
SAMPLED = GREEDY | {"sampling": ds4jax.Sampling(temperature=0.8, top_p=0.95, seed=7)}
KINDS = {"greedy": GREEDY, "sampled": SAMPLED}
alone = {}
for kind, options in KINDS.items():
    with engine() as quiet:
        alone[kind] = quiet.submit(PROMPT, **options).result()
    print(f"{kind}: {alone[kind].fingerprint}  {alone[kind].text[:60]!r}")

# %% [markdown]
# ## In a crowd
#
# Now one engine gets ten other requests, five before our two and five after them, with other prompts, lengths, temperatures and
# seeds. When our greedy reply has eight tokens, every other neighbour is cancelled. At the end both of our requests are sent
# again: now the engine takes most of their prompt from its prefix cache.


# %%
class Watched:
    """A request, and when its tokens came."""

    def __init__(self, house: ds4jax.Engine, prompt, **options):
        self.times = []
        self.request = house.submit(prompt, **options)
        self.request.listen(lambda: self.times.append((time.perf_counter(), self.request.made)))

    def reached(self, tokens: int) -> None:
        """Wait until so many tokens have come, or the end."""
        while self.request.made < tokens and not self.request.done:
            time.sleep(0.01)


def neighbour(house: ds4jax.Engine, i: int) -> Watched:
    """Another request; the early ones are the shorter ones."""
    prompt = model.encode(held_out[400 * i : 400 * i + 600])[: 20 + 9 * i]
    sampling = ds4jax.Sampling(temperature=0.3 * (i % 4), seed=i)
    return Watched(house, prompt, max_new_tokens=24 + 4 * i, ignore_eos=True, sampling=sampling)


began = time.perf_counter()
with engine() as busy:
    crowd = [neighbour(busy, i) for i in range(5)]
    crowd[0].reached(4)
    ours = {kind: Watched(busy, PROMPT, **options) for kind, options in KINDS.items()}
    crowd += [neighbour(busy, i) for i in range(5, 10)]
    ours["greedy"].reached(8)
    for other in crowd[1::2]:
        other.request.cancel()
    crowded = {kind: one.request.result() for kind, one in ours.items()}
    hits = {kind: busy.submit(PROMPT, **options).result() for kind, options in KINDS.items()}
    ends = [other.request.result() for other in crowd]
print("neighbours:", ", ".join(f"{end.finish_reason} after {len(end.ids)}" for end in ends))
print("rows of our prompts from the prefix cache:", {kind: hit.reused for kind, hit in hits.items()})
assert any(end.finish_reason == "cancelled" for end in ends)
assert all(hit.reused >= 32 for hit in hits.values())

# %%
figure, axes = plt.subplots(figsize=(7.6, 3.0))
for other in crowd:
    seconds, tokens = np.array(other.times).T
    axes.step(seconds - began, tokens, color="0.75", where="post")
    if other.request.result().finish_reason == "cancelled":
        axes.plot(seconds[-1] - began, tokens[-1], "x", color="0.4", markersize=6)
for kind, one in ours.items():
    seconds, tokens = np.array(one.times).T
    axes.step(seconds - began, tokens, where="post", linewidth=2.2, label=f"ours, {kind}")
axes.plot([], [], color="0.75", label="ten others")
axes.plot([], [], "x", color="0.4", label="cancelled")
axes.set(xlabel="seconds", ylabel="new tokens", ylim=(0, 85), title="Twelve requests in four slots")
axes.legend(ncols=2, loc="upper left")
plt.show()

# %% [markdown]
# ## The same tokens, the same bits
#
# Each row of the picture compares a reply with the reply that was alone. The last two rows are controls: a prompt without its
# first token, and another seed. They must differ, or the comparison would show nothing.

# %%
with engine() as quiet:
    shorter = quiet.submit(PROMPT[1:], **GREEDY).result()
    seeded = quiet.submit(PROMPT, **SAMPLED | {"sampling": ds4jax.Sampling(temperature=0.8, top_p=0.95, seed=8)}).result()
pairs = {
    "greedy, in the crowd": (alone["greedy"], crowded["greedy"]),
    "sampled, in the crowd": (alone["sampled"], crowded["sampled"]),
    "greedy, prompt from the cache": (alone["greedy"], hits["greedy"]),
    "sampled, prompt from the cache": (alone["sampled"], hits["sampled"]),
    "control: a shorter prompt": (alone["greedy"], shorter),
    "control: another seed": (alone["sampled"], seeded),
}


def marks(left: ds4jax.Result, right: ds4jax.Result) -> np.ndarray:
    """For each token: 2 for the same bits, 1 for the same token, 0 for another one."""
    same_bits = (left.fingerprints[:NEW_TOKENS] == right.fingerprints[:NEW_TOKENS]).all(-1)
    return np.where(same_bits, 2, np.array(left.ids) == np.array(right.ids))


found = np.array([marks(*pair) for pair in pairs.values()])
figure, axes = plt.subplots(figsize=(7.6, 2.6))
colours = ListedColormap(["#d55e00", "#e8c468", "#0072b2"])
image = axes.imshow(found, cmap=colours, vmin=-0.5, vmax=2.5, aspect="auto", interpolation="none")
axes.hlines(np.arange(len(pairs) - 1) + 0.5, -0.5, NEW_TOKENS - 0.5, color="white", linewidth=3)
axes.set(xlabel="new token", title="Beside the same request alone")
axes.set_yticks(range(len(pairs)), pairs)
axes.grid(visible=False)
bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2])
bar.ax.set_yticklabels(["other token", "same token,\nother bits", "same bits"])
plt.show()
assert (found[:4] == 2).all()
assert (found[4:] < 2).any(axis=1).all()
for kind in KINDS:
    assert crowded[kind].ids == hits[kind].ids == alone[kind].ids
    assert crowded[kind].fingerprint == hits[kind].fingerprint == alone[kind].fingerprint

# %% [markdown]
# ## What the promise covers
#
# `engine.fingerprint` is a digest of everything else that bits depend on: weights, versions, kind of device, slots, context,
# chunk, type of cache, mode and drafter. `ds4jax serve` sends it as `system_fingerprint`. Engines with equal fingerprints give
# equal replies. The number of slots is part of it, because a step has a fixed number of rows, used or not.
#
# The reasons are simple. Each row of a kernel is computed as if it were alone. A step always has the same rows. Prompts are
# appended in calls of one size. A prefix is reused only up to a place where the same calls would have begun again.

# %%
with engine() as one, engine() as two:
    print(one.fingerprint)
    assert one.fingerprint == two.fingerprint

# %% [markdown]
# ## What other engines report
#
# * **vLLM**: [batch invariance](https://docs.vllm.ai/en/latest/features/batch_invariance/) is a flag, in beta. Its list of tested
#   models has DeepSeek's V3, R1 and V3.1, but not V4. On V4-Flash with MXFP4 experts the flag
#   [did not start](https://github.com/vllm-project/vllm/issues/50576) (6 August 2026). Without it, V4-Flash at temperature 0
#   [gave other texts](https://github.com/vllm-project/vllm/issues/53257), more often with more requests at once (21 August 2026).
# * **SGLang**: [deterministic inference](https://lmsys.org/blog/2025-09-22-sglang-deterministic) is a flag. Its authors measured
#   34 % of overhead (22 September 2025). For V4 it was [asked for](https://github.com/sgl-project/sglang/issues/36174)
#   (24 August 2026), and its [pull request](https://github.com/sgl-project/sglang/pull/37292) was open on 2 September 2026.
# * **llama.cpp**: `cache_prompt` of the [server](https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md) is on
#   by default. Its description warns that the bits of logits may depend on the batch size, so that results can vary (read in
#   November 2026).
#
# The dates are those of the posts, and what they say may have changed since. An engine of ds4jax has no such flag: it knows no
# other way to compute.
