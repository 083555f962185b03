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
# The MTP block proposes tokens, the model verifies them in one pass and keeps those that are its own. How many are kept decides
# whether drafting pays. Here: acceptance by depth, by kind of text and along a text; the break-even; and the loop that chooses
# its depth by itself.

# %%
import matplotlib.pyplot as plt
import numpy as np

import ds4jax
from ds4jax import runtime
from ds4jax.check import HELDOUT

runtime.configure()
plt.style.use("plain.mplstyle")
MOST = 4
model = ds4jax.load(max_draft=MOST)

# %% [markdown]
# ## By depth
#
# One prompt at every depth, all in the same compiled program. The tokens are the same; the number of steps is not.

# %%
held_out = HELDOUT.read_text("utf-8")
PROMPT = model.encode(held_out[:600])[:120]
runs = [model.generate(PROMPT, max_new_tokens=96, draft=depth) for depth in range(MOST + 1)]
for depth, run in enumerate(runs):
    shares = ", ".join(f"{share:.0%}" for share in run.acceptance) or "none made"
    print(f"draft {depth}: {run.steps:3} steps, {run.tokens_per_step:.2f} tokens a step; stood by depth: {shares}")
    assert run.ids == runs[0].ids
    np.testing.assert_array_equal(run.fingerprints, runs[0].fingerprints)

# %% [markdown]
# `acceptance[k]` counts only steps in which all drafts before the *k*-th stood. The second draft and those after it are made by
# the block from its own streams rather than the model's.
#
# ## By kind of text
#
# Teacher forced: at every position of a text, does the block, one token earlier, name the token that the model would take? That
# is how often a greedy first draft stands there. Text that the model knows is easy for both; elsewhere each guesses by itself.

# %%
learnt = (HELDOUT.parent / "train_extract.txt").read_text("utf-8")
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
    """Whether the first draft stands, at each position of a text's beginning."""
    scored = model.logits(model.encode(text)[:WINDOW], mtp=True, strict=True)
    return scored["logits"][1:].argmax(-1) == scored["mtp_logits"].argmax(-1)


stood = {name: stands(text) for name, text in texts.items()}
chains = {
    name: model.generate(model.encode(texts[name])[:120], max_new_tokens=160, draft=MOST, ignore_eos=True)
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
right.set(xlabel="depth of the draft", ylabel="stood when those before did, %", ylim=(0, 103), xticks=range(1, MOST + 1))
right.set(title="In the model's continuation")
right.legend([f"after {name}" for name in chains], fontsize=8, loc="lower left")
plt.show()
assert stood["held out (Revelation)"].mean() > stood["random letters"].mean()

# %% [markdown]
# ## Along a text
#
# The mean hides stretches: on the held-out text the share of drafts that stand rises to nine in ten within a phrase that the
# model knows, and falls below six in ten where something new begins. This is why the depth may be worth changing while a text
# is written.

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
# A step with *K* drafts that each stand with probability *p* commits 1 + p + … + p^K tokens. It pays when that is more than
# what the step costs, in units of a step of plain decode. The left panel takes the costs of this machine, the shortest of
# several runs at each depth; the right one a device that reads the weights once for all rows, where a draft costs the MTP block
# and little else (here 5 % of a step each).

# %%
ROUNDS = 4
times = [
    [model.generate(PROMPT, max_new_tokens=32, draft=depth, ignore_eos=True).ms_per_step for depth in range(MOST + 1)]
    for _ in range(ROUNDS)
]
costs = np.min(times, axis=0)
print("ms a step by depth:", ", ".join(f"{cost:.1f}" for cost in costs))
p = np.linspace(0, 1, 101)
figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.2), sharey=True)
relative = {"this machine, measured": costs / costs[0], "5 % of a step for each draft": 1 + 0.05 * np.arange(MOST + 1)}
for axes, (name, cost) in zip(panels, relative.items(), strict=True):
    for depth in range(1, MOST + 1):
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
# `draft="auto"` takes, before every step, the depth with the most expected tokens for its time, by what was accepted lately and
# what a step costs here. Greedy text does not depend on it.

# %%
prompts = {"held out": PROMPT, "modern prose": model.encode(PROSE)[:120]}
DRAFTS = (0, 1, 2, MOST, "auto")
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
# On a CPU a step pays for each of its eight rows whether they are live or not, so plain decode in this program is slow; a
# program without drafts (`max_draft=0`) has narrower steps. On an accelerator the rows beside the first are nearly free.
