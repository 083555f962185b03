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
# # 8 · Drafters compared
#
# A drafter guesses tokens, and the model verifies them in one step. ds4jax has four kinds: the MTP block of V4-Flash, the DSpark
# drafter of V4-Flash-0731, n-grams, which copy earlier text and need no weights, and pairs of n-grams with one of the others.
# Pairs are left out here, to compile less. The others draft on five kinds of text. The text never changes; what changes is how
# many tokens a step commits.
# Notebook 4 looks at the MTP block alone.

# %%
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import ds4jax
from ds4jax import runtime
from ds4jax.bounds import HELD_OUT_TEXT, TRAINING_EXTRACT
from ds4jax.engine import cost_table

runtime.configure()
plt.style.use("plain.mplstyle")
DRAFTERS = ("mtp", "dspark", "ngram")
models = {name: ds4jax.load(drafter=name) for name in DRAFTERS}
print({name: f"{model.max_draft} drafts a step" for name, model in models.items()})

# %% [markdown]
# ## Tokens a step
#
# Each model continues the first 120 tokens of each text by 64. Without drafts (`draft=0` of the MTP program) a step commits
# one token.

# %%
learnt, held_out = TRAINING_EXTRACT.read_text("utf-8"), HELD_OUT_TEXT.read_text("utf-8")
PROSE = (
    "The train was late again, so Anna bought a coffee and a paper. Prices of houses had gone up, the council argued about a "
    "bridge, and a scientist claimed that octopuses dream. She folded the paper, looked at the clock and thought of phoning. "
)
CODE = "def add(first, second):\n    return first + second\n\nfor i in range(10):\n    print(add(i, 2 * i), end=', ')\n\n"
texts = {
    "learnt\n(Genesis)": learnt,
    "held out\n(Revelation)": held_out,
    "one verse,\nrepeated": learnt[10:200] * 12,
    "modern\nprose": PROSE * 2,
    "program": CODE * 4,
}
prompts = {kind: models["mtp"].encode(text[:3000])[:120] for kind, text in texts.items()}
how = {"max_new_tokens": 64, "ignore_eos": True}
runs = {(name, kind): model.generate(prompts[kind], **how) for name, model in models.items() for kind in texts}
runs |= {("none", kind): models["mtp"].generate(prompts[kind], draft=0, **how) for kind in texts}
for (_, kind), run in runs.items():
    plain = runs["none", kind]
    assert run.ids == plain.ids
    if jax.default_backend() == "cpu":
        # The three programs differ. On a CPU even their logits have the same bits.
        np.testing.assert_array_equal(run.fingerprints, plain.fingerprints)
ROWS = ("none", *DRAFTERS)
per_step = np.array([[runs[name, kind].tokens_per_step for kind in texts] for name in ROWS])
print(f"{len(runs)} texts, the same tokens from every drafter")

# %%
figure, axes = plt.subplots(figsize=(7.6, 3.0))
image = axes.imshow(per_step, vmin=1, aspect="auto")
for row, column in np.ndindex(per_step.shape):
    value = per_step[row, column]
    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > image.norm.vmax / 1.6 else "white")
axes.set_xticks(range(len(texts)), texts)
axes.set_yticks(range(len(ROWS)), ROWS)
axes.set(title="Tokens a step, by drafter and kind of text")
axes.grid(visible=False)
figure.colorbar(image, ax=axes, label="tokens a step")
plt.show()
assert (per_step[0] == 1).all()
assert (per_step[1:3] > 1).all()

# %% [markdown]
# ## By slot
#
# A step's drafts stand in slots. A draft counts only where all drafts before it stood. The MTP block makes its second draft from
# its own streams instead of the model's. DSpark makes its block at once. N-grams copy: where the text repeats, one draft that
# stands is often followed by others.

# %%
figure, panels = plt.subplots(1, len(DRAFTERS), figsize=(7.6, 3.0), sharey=True)
for axes, name in zip(panels, DRAFTERS, strict=True):
    for i, kind in enumerate(texts):
        run = runs[name, kind]
        shares = [100 * stood / tried if tried else np.nan for stood, tried in zip(run.stood, run.tried, strict=True)]
        axes.plot(range(1, 1 + len(shares)), shares, "o-", color=f"C{i}", markersize=4, label=kind.replace("\n", " "))
    axes.set(xlabel="slot", title=name, ylim=(-4, 104), xticks=range(1, 1 + models[name].max_draft))
panels[0].set(ylabel="stood when those before did, %")
handles, labels = panels[0].get_legend_handles_labels()
figure.legend(handles, labels, ncols=3, loc="outside lower center")
plt.show()
for name in DRAFTERS:
    tried, stood = (sum(sum(getattr(runs[name, kind], field)) for kind in texts) for field in ("tried", "stood"))
    print(f"{name:10} {tried:4} drafts that counted, {stood:4} stood")

# %% [markdown]
# ## When each pays
#
# A step with drafts takes longer than a plain step, so a drafter pays if its step commits more tokens than the ratio of the two.
# The package's table has the times of steps at V4-Flash's size on an H200, and `benchmarks/results` the plain step's in a program
# without drafts. The dots are the tiny model's tokens a step on the five texts: they show where a text falls, not how fast
# V4-Flash writes it. N-grams and pairs have no entry in the table: they have not been timed on a GPU.

# %%
RESULTS = Path("../benchmarks/results")
FILES = {"mtp": "nvidia-h200-decode.json", "dspark": "nvidia-h200-decode-0731.json"}
DEVICE = "NVIDIA H200"
figure, axes = plt.subplots()
for i, (name, file) in enumerate(FILES.items(), 1):
    entry = next(one for one in cost_table.shipped().values() if (one.device, one.drafter) == (DEVICE, name))
    plain = next(row["ms_per_step"] for row in json.loads((RESULTS / file).read_text())["rows"] if row["name"] == "plain")
    most = 1 + entry.max_draft
    needed = entry.ms[-1] / plain
    tokens = np.linspace(1, most, 50)
    label = f"{name}: {entry.max_draft} drafts, {entry.ms[-1]:.2f} ms a step; plain {plain:.2f} ms"
    axes.plot(tokens, tokens / needed, color=f"C{i}", label=label)
    here = per_step[ROWS.index(name)]
    axes.plot(here, here / needed, "o", color=f"C{i}")
    print(f"{name} pays on an {DEVICE} from {needed:.2f} tokens a step on, and is at most {most / needed:.1f} times as fast")
    assert 1 < needed < most
axes.axhline(1, color="0.4", linewidth=0.9, linestyle="--")
axes.text(6, 0.9, "plain decode", color="0.4", ha="right", va="top")
axes.set(xlabel="tokens a step", ylabel="speed, plain decode = 1", title=f"Break-even at V4-Flash's size, {DEVICE}")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# What follows for a choice:
#
# * **none**: on a CPU, where every row of a step costs time. `ds4jax generate` does so there by itself.
# * **MTP**: on a GPU, for most texts. A step with its two drafts is the shorter one, so it needs fewer tokens a step.
# * **DSpark**: for weights that have it. A step is longer, and pays where several of its drafts stand.
# * **n-grams**: for edits, extraction and programs, where a reply copies its prompt; and for weights without a drafter.
# * **mtp+ngram**, **dspark+ngram**: for mixed work. The pair copies only where the text has a long match and the first draft is
#   in doubt.
#
# `draft="auto"` measures acceptance as it writes, and stops drafting where it does not pay.
