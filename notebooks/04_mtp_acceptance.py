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
# # 4 · When drafts stand
#
# The MTP block drafts tokens. The model verifies them in one pass and accepts the drafts that equal its own tokens: they stand.
# The number of accepted drafts decides whether drafting is faster. This notebook shows acceptance by depth, by kind of text and
# along a text; the break-even; and the loop that chooses its depth itself. Notebook 8 compares this block with other drafters.

# %%
import matplotlib.pyplot as plt
import numpy as np

import ds4jax
from ds4jax import runtime
from ds4jax.bounds import HELD_OUT_TEXT

runtime.configure()
plt.style.use("plain.mplstyle")
MAX_DRAFT = 4
model = ds4jax.load(max_draft=MAX_DRAFT)

# %% [markdown]
# ## By depth
#
# One prompt at every depth, in the same compiled program. The tokens are the same; the number of steps differs.

# %%
held_out = HELD_OUT_TEXT.read_text("utf-8")
PROMPT = model.encode(held_out[:600])[:120]
runs = [model.generate(PROMPT, max_new_tokens=96, draft=depth) for depth in range(MAX_DRAFT + 1)]
for depth, run in enumerate(runs):
    shares = ", ".join(f"{share:.0%}" for share in run.acceptance) or "none made"
    print(f"draft {depth}: {run.steps:3} steps, {run.tokens_per_step:.2f} tokens a step; stood by depth: {shares}")
    assert run.ids == runs[0].ids
    np.testing.assert_array_equal(run.fingerprints, runs[0].fingerprints)

# %% [markdown]
# `acceptance[k]` counts only steps in which all drafts before the *k*-th stood. For the second and later drafts, the block uses
# its own streams in place of the model's.
#
# ## By kind of text
#
# This measurement is teacher forced: at every position of a text, does the block's top token, one token earlier, equal the
# model's top token? The share is the acceptance of a greedy first draft. On text that the model knows, both predict well and
# agree. On other text they agree less often.

# %%
learnt = (HELD_OUT_TEXT.parent / "train_extract.txt").read_text("utf-8")
PROSE = (
    "The train was late again, so Anna bought a coffee and a paper. Prices of houses had gone up, the council argued about a "
    "bridge, and a scientist claimed that octopuses dream. She folded the paper, looked at the clock and thought of phoning. "
)
CODE = "def add(first, second):\n    return first + second\n\nfor i in range(10):\n    print(add(i, 2 * i), end=', ')\n\n"
random = np.random.default_rng(0)
letters = "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz ")) for _ in range(900))
texts = {
    "learnt (Genesis)": learnt[:3000],
    "held out (Revelation)": held_out[:3000],
    "one verse, repeated": learnt[10:200] * 12,
    "modern prose": PROSE * 2,
    "program": CODE * 4,
    "random letters": letters,
}
WINDOW = 512


def stands(text: str) -> np.ndarray:
    """Whether the first draft stands, at each position of the first `WINDOW` tokens of a text."""
    scored = model.logits(model.encode(text)[:WINDOW], mtp=True, strict=True)
    return scored["logits"][1:].argmax(-1) == scored["mtp_logits"].argmax(-1)


stood = {name: stands(text) for name, text in texts.items()}
chains = {
    name: model.generate(model.encode(texts[name])[:120], max_new_tokens=160, draft=MAX_DRAFT, ignore_eos=True)
    for name in ("learnt (Genesis)", "held out (Revelation)", "modern prose")
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), width_ratios=(5, 4))
names = list(texts)[::-1]
bars = left.barh(names, [100 * stood[name].mean() for name in names], color=[f"C{len(names) - 1 - i}" for i in range(len(names))])
left.bar_label(bars, fmt="%.0f %%", padding=2)
left.set(xlabel="first drafts that stand, %", xlim=(0, 100), title="On the text itself")
left.grid(axis="y", visible=False)
for name, chain in chains.items():
    colour = f"C{list(texts).index(name)}"
    right.plot(range(1, 1 + len(chain.acceptance)), [100 * share for share in chain.acceptance], "o-", color=colour, markersize=4)
right.set(xlabel="depth of the draft", ylabel="stood when those before did, %", ylim=(0, 103), xticks=range(1, MAX_DRAFT + 1))
right.set(title="In the model's continuation")
right.legend([f"after {name}" for name in chains], fontsize=8, loc="lower left")
plt.show()
assert stood["held out (Revelation)"].mean() > stood["random letters"].mean()

# %% [markdown]
# ## Along a text
#
# The acceptance varies along a text. On the held-out text it rises to nine in ten within a phrase that the model knows, and
# falls below six in ten where a new subject begins. So it can be faster to change the depth during a text.

# %%
SPAN = 32
figure, axes = plt.subplots(figsize=(7.6, 2.9))
for name, colour in (("held out (Revelation)", "C1"), ("one verse, repeated", "C2"), ("modern prose", "C3")):
    smooth = np.convolve(stood[name], np.ones(SPAN) / SPAN, "valid")
    axes.plot(np.arange(len(smooth)) + SPAN // 2, 100 * smooth, color=colour, label=name)
axes.set(xlabel="position, tokens", ylabel=f"first drafts that stand, %\n(mean of {SPAN} tokens)", ylim=(0, 118))
axes.set_yticks(range(0, 101, 25))
axes.legend(ncols=3, loc="upper center")
plt.show()

# %% [markdown]
# ## Break-even
#
# A step with *K* drafts that each stand with probability *p* commits 1 + p + … + p^K tokens. It is faster than plain decode if
# this number exceeds the cost of the step, in units of a plain step. The left panel uses the costs of this machine: the
# shortest of several runs at each depth. The right panel shows a device that reads the weights once for all rows. There a draft
# costs little more than the MTP block (here 5 % of a step).

# %%
ROUNDS = 4
times = [
    [model.generate(PROMPT, max_new_tokens=32, draft=depth, ignore_eos=True).ms_per_step for depth in range(MAX_DRAFT + 1)]
    for _ in range(ROUNDS)
]
costs = np.min(times, axis=0)
print("ms a step by depth:", ", ".join(f"{cost:.1f}" for cost in costs))
p = np.linspace(0, 1, 101)
figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.2), sharey=True)
relative = {"this machine, measured": costs / costs[0], "5 % of a step for each draft": 1 + 0.05 * np.arange(MAX_DRAFT + 1)}
for axes, (name, cost) in zip(panels, relative.items(), strict=True):
    for depth in range(1, MAX_DRAFT + 1):
        tokens = sum(p**k for k in range(depth + 1))
        axes.plot(100 * p, tokens / cost[depth], label=f"{depth} draft{'s' * (depth > 1)}")
    axes.axhline(1, color="0.4", linewidth=0.9, linestyle="--")
    axes.set(xlabel="probability that a draft stands, %", title=name)
panels[0].set(ylabel="speed, plain decode = 1")
panels[0].text(99, 0.86, "break-even", color="0.4", ha="right")
panels[1].legend(loc="upper left")
plt.show()

# %% [markdown]
# ## The adaptive depth
#
# Before every step, `draft="auto"` chooses the depth with the maximum of expected tokens per second. It estimates them from the
# recent acceptance and from the time of a step at each depth. The package has a table of these times for some models and devices;
# for others, as for this loop of four drafts, they are measured first. Greedy text does not depend on the depth.

# %%
prompts = {"held out": PROMPT, "modern prose": model.encode(PROSE)[:120]}
DRAFTS = (0, 1, 2, MAX_DRAFT, "auto")
speeds = dict.fromkeys([(name, draft) for name in prompts for draft in DRAFTS], 0.0)
for _ in range(3):
    for name, prompt in prompts.items():
        timed = {draft: model.generate(prompt, max_new_tokens=48, draft=draft, ignore_eos=True) for draft in DRAFTS}
        assert all(run.ids == timed[0].ids for run in timed.values())
        for draft, run in timed.items():
            speeds[name, draft] = max(speeds[name, draft], run.tokens_per_second)

# %%
figure, axes = plt.subplots(figsize=(7.6, 2.9))
for i, name in enumerate(prompts):
    place = np.arange(len(DRAFTS)) + (i - 0.5) * 0.38
    bars = axes.bar(place, [speeds[name, draft] for draft in DRAFTS], width=0.36, label=name)
    axes.bar_label(bars, fmt="%.0f")
axes.set_xticks(range(len(DRAFTS)), [str(draft) for draft in DRAFTS])
axes.set(xlabel="drafts a step", ylabel="tokens a second", title="Speed on the machine that made this picture, best of three")
axes.margins(y=0.15)
axes.grid(axis="x", visible=False)
axes.legend(ncols=2, loc="upper left")
plt.show()

# %% [markdown]
# On a CPU, a step computes all of its eight rows, live or not, so plain decode in this program is slow. A program without
# drafts (`max_draft=0`) has narrower steps. On an accelerator, the rows after the first are nearly free.
