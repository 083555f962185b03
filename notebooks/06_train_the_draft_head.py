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
# # 6 · Train the draft head on your own text
#
# Drafting is fast when many drafts stand, and fewer stand on text that the MTP block has not seen. The block can be trained
# alone. The main model is frozen, so its output cannot change, only its speed. Here the King James model is tuned on weather
# reports: first its MTP block, then its DSpark drafter.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import ds4jax
from ds4jax import runtime
from ds4jax.model.dspark import DSPARK_PARAMETERS
from ds4jax.training.dspark import dspark_loss, dspark_teacher
from ds4jax.training.mtp import MTP_PARAMETERS, mtp_loss, teacher

runtime.configure()
plt.style.use("plain.mplstyle")
shipped = ds4jax.load(max_draft=1)

# %% [markdown]
# ## A text that the model has never seen
#
# A few templates make 26 kB of reports. The last reports are held out.

# %%
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("the northern hills", "the harbour towns", "the islands", "the river valley", "the high moor", "the lake country")
SKIES = ("dry and bright", "grey and damp", "cold with broken cloud", "mild and hazy", "clear after early fog")
WINDS = ("a light westerly breeze", "a fresh wind off the sea", "gusts from the north-east", "hardly any wind")
TURNS = (
    "Showers reach",
    "Snow may settle on",
    "Thunder is likely over",
    "The sun breaks through above",
    "Frost is expected across",
)

random = np.random.default_rng(7)


def report() -> str:
    """One day's weather in three sentences."""
    here, there, later = random.choice(PLACES, 3, replace=False)
    low = random.integers(-4, 14)
    return (
        f"{random.choice(DAYS)} starts {random.choice(SKIES)} in {here}, with {random.choice(WINDS)}. "
        f"{random.choice(TURNS)} {there} by noon, and temperatures rise from {low} to {low + random.integers(3, 9)} degrees. "
        f"Tonight will be {random.choice(SKIES)} in {later}; drivers there should take care.\n"
    )


reports = [report() for _ in range(100)]
known_text, new_text = "".join(reports[:80]), "".join(reports[80:])
print(f"{len(known_text):,} bytes to learn from, {len(new_text):,} held out. For example:\n\n{reports[0]}")

# %% [markdown]
# ## How often does the first draft stand?
#
# `float_model()` dequantises the Q8_0 weights to float32, because gradients need float32. `with_mtp_of` combines its MTP block
# with the Q8_0 weights of the main model. So the shipped block and the tuned block run in the same compiled program.
#
# A greedy first draft stands when the block's top token equals the model's. `model.logits(..., mtp=True)` returns the logits of
# both at every position of a text.

# %%
floats = shipped.float_model()
model = shipped.with_mtp_of(floats)
held_ids = model.encode(new_text)[:1024]


def stands(model: ds4jax.LanguageModel) -> np.ndarray:
    """Whether the first draft stands at each position of the held-out reports."""
    scored = model.logits(held_ids, mtp=True, strict=True)
    return scored["logits"][1:].argmax(-1) == scored["mtp_logits"].argmax(-1)


before = stands(model)
print(f"before training {before.mean():.1%} of {len(before)} first drafts stand")

# %% [markdown]
# ## Train
#
# `teacher` runs the frozen model once over each window of the text. After that, `mtp_loss` runs only the block. With
# `distill=1`, the block learns the model's distribution and not the text, because the model accepts or rejects its drafts.

# %%
WINDOW, BATCH, STEPS = 128, 8, 36
ids = np.array(model.tokenizer.encode(known_text), np.int32)
starts = range(0, len(ids) - WINDOW - 1, WINDOW)
windows = jnp.asarray(np.stack([ids[start : start + WINDOW + 1] for start in starts]))

known = jax.lax.map(jax.jit(lambda window: teacher(floats, window)), windows)
graph, block, frozen = nnx.split(floats, MTP_PARAMETERS, ...)
optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, STEPS))


def loss(block, known, windows):
    """Mean over a batch of windows."""
    network = nnx.merge(graph, block, frozen)
    losses, parts = jax.vmap(lambda known, window: mtp_loss(network, window, known=known, distill=1.0))(known, windows)
    return jnp.mean(losses), jnp.mean(parts["agreement"])


@jax.jit
def step(block, state, rows):
    """One step of Adam on the block's weights."""
    batch = jax.tree.map(lambda array: array[rows], (known, windows))
    (value, agreement), gradient = jax.value_and_grad(loss, has_aux=True)(block, *batch)
    updates, state = optimizer.update(gradient, state, block)
    return optax.apply_updates(block, updates), state, value, agreement


state, curve, began = optimizer.init(block), [], time.perf_counter()
for _ in range(STEPS):
    rows = random.choice(len(windows), BATCH, replace=False)
    block, state, value, agreement = step(block, state, rows)
    curve.append((float(value), float(agreement)))
trained = sum(leaf.size for leaf in jax.tree.leaves(block))
print(f"{STEPS} steps on {len(windows)} windows of {WINDOW} tokens, {trained:,} parameters, {time.perf_counter() - began:.0f} s")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9))
left.plot([value for value, _ in curve])
left.set(xlabel="step", ylabel="loss, nats a token", title="MTP loss")
right.plot([100 * agreement for _, agreement in curve], color="C2")
right.set(xlabel="step", ylabel="first drafts that stand, %", title="On the batch", ylim=(0, 100))
plt.show()

# %% [markdown]
# ## After

# %%
tuned = model.with_mtp_of(nnx.merge(graph, block, frozen))
after = stands(tuned)
print(f"held-out reports: {before.mean():.1%} before, {after.mean():.1%} after")
assert after.mean() - before.mean() >= 0.10

# %%
SPAN = 64
position = np.arange(len(before) - SPAN + 1) + SPAN // 2
figure, (axes, bars) = plt.subplots(1, 2, width_ratios=(3, 1))
for name, stood in (("before", before), ("after", after)):
    axes.plot(position, 100 * np.convolve(stood, np.ones(SPAN) / SPAN, "valid"), label=name)
    bar = bars.bar(name, 100 * stood.mean())
    bars.bar_label(bar, fmt="%.0f %%")
axes.set(
    xlabel="position in the held-out reports, tokens",
    ylabel="first drafts that stand, %",
    ylim=(0, 105),
    title=f"Acceptance on the new text, mean of {SPAN} tokens",
)
axes.legend(loc="lower left", ncols=2)
bars.set(ylim=(0, 105), title="Whole text")
bars.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# ## The decode loop agrees
#
# The decode loop drafts, verifies and accepts, and measures the same. It generates two tokens after each of 48 places in the
# held-out reports. This takes one step if the first draft stands, and two if it does not. Longer continuations soon leave the
# subject of weather. There the tuned block drafts no better than before, or a little worse. Every token still equals plain
# decode's.

# %%
PLACES_TRIED, CONTEXT = 48, 80
cuts = np.linspace(CONTEXT, len(held_ids) - 1, PLACES_TRIED).astype(int)
blocks = {"as shipped": model, "tuned": tuned}


def same_as_plain(prompt: np.ndarray, tokens: int) -> dict[str, int]:
    """Steps of each block. Also checks that the tokens equal plain decode's."""
    plain = model.generate(prompt, max_new_tokens=tokens, draft=0, ignore_eos=True)
    steps = {}
    for name, drafting in blocks.items():
        result = drafting.generate(prompt, max_new_tokens=tokens, draft=1, ignore_eos=True)
        assert result.ids == plain.ids, (name, prompt)
        steps[name] = result.steps
    return steps


tried = [same_as_plain(held_ids[cut - CONTEXT : cut], 2) for cut in cuts]
stood = {name: np.mean([steps[name] == 1 for steps in tried]) for name in blocks}
for name, share in stood.items():
    print(f"{name:<11} the first draft stood in {share:.0%} of {PLACES_TRIED} places")
assert stood["tuned"] - stood["as shipped"] >= 0.10

for cut in cuts[:: PLACES_TRIED // 4]:
    print("48 tokens, steps:", same_as_plain(held_ids[cut - CONTEXT : cut], 48))
print("every token equal to plain decode's")

# %% [markdown]
# ## The same with a DSpark drafter
#
# A DSpark drafter makes five drafts in one pass. `dspark_teacher` and `dspark_loss` train it in the same way: the main model runs
# once over each window, then only the drafter runs. A step takes some positions of each window and drafts after each of them.
# `accepted` is the mean number of drafts before the first one that differs from the model's most likely token.

# %%
DRAFTS_AT, DSPARK_STEPS = 16, 24
with_dspark = ds4jax.load(drafter="dspark").float_model()
last = WINDOW - with_dspark.config.dspark_block - 1
known = jax.lax.map(jax.jit(lambda window: dspark_teacher(with_dspark, window)), windows)
held_windows = jnp.asarray(np.stack([held_ids[start : start + WINDOW + 1] for start in range(0, len(held_ids) - WINDOW, WINDOW)]))
held_known = jax.lax.map(jax.jit(lambda window: dspark_teacher(with_dspark, window)), held_windows)
graph, block, frozen = nnx.split(with_dspark, DSPARK_PARAMETERS, ...)
optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, DSPARK_STEPS))


def dspark_losses(block, known, windows, places):
    """Mean over a batch of windows, with drafts after `places` of each."""
    network = nnx.merge(graph, block, frozen)
    losses, parts = jax.vmap(lambda known, window, at: dspark_loss(network, window, at, known=known, distill=1.0))(
        known, windows, places
    )
    return jnp.mean(losses), jnp.mean(parts["accepted"])


@jax.jit
def dspark_step(block, state, rows, places):
    """One step of Adam on the drafter's weights."""
    batch = jax.tree.map(lambda array: array[rows], (known, windows))
    (_, accepted), gradient = jax.value_and_grad(dspark_losses, has_aux=True)(block, *batch, places)
    updates, state = optimizer.update(gradient, state, block)
    return optax.apply_updates(block, updates), state, accepted


held_places = jnp.asarray(np.tile(np.linspace(0, last, DRAFTS_AT).astype(np.int32), (len(held_windows), 1)))
held_accepted = jax.jit(lambda block: dspark_losses(block, held_known, held_windows, held_places)[1])
accepted_before, began = float(held_accepted(block)), time.perf_counter()
state, accepted_curve = optimizer.init(block), []
for _ in range(DSPARK_STEPS):
    rows = random.choice(len(windows), BATCH, replace=False)
    places = jnp.asarray(random.integers(0, last + 1, (BATCH, DRAFTS_AT)), jnp.int32)
    block, state, accepted = dspark_step(block, state, rows, places)
    accepted_curve.append(float(accepted))
accepted_after = float(held_accepted(block))
trained = sum(leaf.size for leaf in jax.tree.leaves(block))
print(f"{DSPARK_STEPS} steps, {trained:,} parameters, {time.perf_counter() - began:.0f} s")
print(f"held-out reports: {accepted_before:.2f} of 5 drafts before, {accepted_after:.2f} after")
assert accepted_after - accepted_before >= 0.5

# %%
figure, axes = plt.subplots(figsize=(3.8, 2.9))
axes.plot(accepted_curve, color="C2")
axes.set(xlabel="step", ylabel="drafts of 5 that stand", title="DSpark, on the batch", ylim=(0, 5))
plt.show()

# %% [markdown]
# `ds4jax train --head dspark` and `--head mtp` do this for a file: they train on text that the model itself continues, and write
# a file for `--drafter-file`.
