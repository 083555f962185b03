"""Constants and bounds of options, shared by command line, loaders and engine; importing them does not import JAX."""

from __future__ import annotations

import dataclasses
import math
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.config import Config

# The tiny model that ships with the package.
SHIPPED = Path(__file__).parent / "assets" / "tiny.gguf"
# Its DSpark drafter. It does not lie beside the model, so that the MTP block in the model's file drafts unless DSpark is asked
# for. On a CPU neither is as fast as no drafts: a step costs more than its drafts bring.
SHIPPED_DSPARK = SHIPPED.parent / "heads" / "dspark-tiny.gguf"
HELD_OUT_TEXT = SHIPPED.with_name("heldout.txt")
TRAINING_EXTRACT = SHIPPED.with_name("train_extract.txt")
# Times of decode steps of known models and devices.
COSTS = SHIPPED.with_name("costs.json")

# Drafts of a decode step.
MAX_DRAFTS = 7
# The end of a drafter's name: n-grams draft where it is unsure, see `ds4jax.decode.drafters.second_opinion`.
AND_NGRAM = "+ngram"
# Names of drafters that a model can be opened with; "auto" is the best one that its weights have.
DRAFTERS = ("auto", "mtp", "dspark", "ngram", f"mtp{AND_NGRAM}", f"dspark{AND_NGRAM}", "none")
# How several devices exchange outputs in a decode step; "auto" is what was measured to be faster.
EXCHANGES = ("auto", "collective", "mailbox")
# Those that are measured beside each other.
WAYS = EXCHANGES[1:]
# No token has this id: the only stop token of a generation that ignores the end of the text.
NO_STOP = -1
MAX_TOKENS = 2**31 - 1
# Reserved for the temporary arrays of a program: the logits of a prefill of 512 rows take 0.3 GB, the rest is for activations,
# dequantised experts and the program itself.
WORKING_BYTES = 2_000_000_000

# Types of dense matrices that a checkpoint directory can be read as, and their GGUF names.
DENSE_FORMS = {"q8_0": "Q8_0", "bf16": "BF16", "f32": "F32"}
# Types that `ds4jax convert --requantise` writes.
REQUANTISED_FORMS = DENSE_FORMS | {"f16": "F16"}
# What `ds4jax convert` writes: GGUF for llama.cpp, GGUF for the ds4 project's engine, or a checkpoint directory.
FLAVOURS = ("mainline", "antirez", "hub")
# Layouts of models with random weights.
LAYOUT_NAMES = ("flash-q2", "small-q2", "ud-iq3-xxs", "small-ud-iq3-xxs", "flash-0731-q2", "small-0731-q2", "mxfp4-layout")
# What `ds4jax bench mesh` measures, in this order: chains of gathers, models, and one model in two processes.
MESH_PIECES = ("gathers", "plain", "drafts", "slots", "prefill", "long", "processes")


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator, or several equal ones.

    Attributes:
        memory, bandwidth: bytes and bytes/s of each card; an unknown bandwidth is None.
        cards: their number.
    """

    name: str
    memory: int
    bandwidth: float | None
    cards: int = 1


# Source: NVIDIA's data sheets of H100 SXM, H200 and RTX PRO 6000 Blackwell.
_CARDS = (
    Device("h100", 80_000_000_000, 3.35e12),
    Device("h200", 141_000_000_000, 4.8e12),
    Device("rtx-pro-6000", 96_000_000_000, 1.79e12),
)
# Numbers of cards that are planned for, of the first two.
MANY_CARDS = (2, 4, 8, 16)
_SEVERAL = [dataclasses.replace(one, name=f"{one.name}x{count}", cards=count) for one in _CARDS[:2] for count in MANY_CARDS]
DEVICES = {one.name: one for one in (*_CARDS, *_SEVERAL)}


@dataclasses.dataclass(frozen=True)
class Integers:
    """The integers that an option accepts.

    Attributes:
        smallest, largest: minimum and maximum; None for no bound.
        rule: the bounds in words, for a message.
    """

    smallest: int | None
    largest: int | None
    rule: str

    def holds(self, value: int) -> bool:
        """Whether the option accepts this integer."""
        return (self.smallest is None or value >= self.smallest) and (self.largest is None or value <= self.largest)

    def checked(self, field: str, value: Any) -> int:
        """The value as a Python int. Integers of numpy and JAX are accepted, `True` and 2.0 are not.

        Raises:
            InputError: another value; the message names the field.
        """
        try:
            number = None if is_flag(value) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise InputError(f"{field} is {shown(value)}, which is no integer; {self.rule}")
        if not self.holds(number):
            raise InputError(f"{field} is {number}; {self.rule}")
        return number


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The finite numbers that an option accepts.

    Attributes:
        smallest, largest: minimum and maximum; `above` excludes the minimum.
        rule: the bounds in words, for a message.
    """

    smallest: float
    largest: float
    rule: str
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether the option accepts this number."""
        beyond = value > self.smallest if self.above else value >= self.smallest
        return math.isfinite(value) and beyond and value <= self.largest

    def checked(self, field: str, value: Any) -> float:
        """The value as a Python float. Integers and scalars of numpy and JAX are accepted, strings and `True` are not.

        Raises:
            InputError: another value; the message names the field.
        """
        try:
            number = float(value) if hasattr(type(value), "__float__") and not is_flag(value) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None:
            raise InputError(f"{field} is {shown(value)}, which is no number; {self.rule}")
        if not self.holds(number):
            raise InputError(f"{field} is {number}; {self.rule}")
        return number


def own_drafter(config: Config) -> str:
    """The name of the drafter that is part of a model's weights; "none" without one."""
    return "dspark" if config.n_dspark else "mtp" if config.n_mtp else "none"


def drafts_of(name: str, config: Config) -> tuple[int, int]:
    """Drafts per step of a drafter by default, and the most that it can make.

    A model without a drafter of its own takes any drafter that is passed to it.
    """
    block = min(config.dspark_block, MAX_DRAFTS)
    by_first = {"mtp": (2, 4), "dspark": (block, block), "ngram": (4, MAX_DRAFTS), "none": (0, MAX_DRAFTS)}
    return by_first[name.removesuffix(AND_NGRAM)]


def max_draft_of(name: str, config: Config, asked: int | None, *, field: str = "max-draft") -> int:
    """The maximum number of drafts per step of a loop with this drafter; None asks for the drafter's default.

    `field` is the option's name in messages.

    Raises:
        InputError: the drafter cannot make so many.
    """
    default, most = drafts_of(name, config)
    depth = MAX_DRAFT.checked(field, default if asked is None else asked)
    if depth > most:
        raise InputError(f"{field} is {depth}; the {name} drafter makes at most {most} drafts a step")
    return depth


NEW_TOKENS = Integers(1, None, "it must be at least 1")
CHUNK = Integers(1, None, "it must be at least 1")
CONTEXT = Integers(2, None, "it must be at least 2, a token of the prompt and one of the reply")
DEVICE_COUNT = Integers(1, None, "it must be at least 1, or all")
GROUP_COUNT = Integers(1, None, "it must be at least 1")
SLOTS = Integers(1, 64, "it must be 1 to 64")
WAITING = Integers(1, None, "it must be at least 1")
BYTES = Integers(0, None, "it must be at least 0")
BUDGET = Integers(None, None, "it is a number of tokens")
POSITION = Integers(0, None, "it must be at least 0")
TOP_K = Integers(0, None, "it must be at least 0 (0 keeps all tokens)")
SEED = Integers(-(2**63), 2**63 - 1, "it must fit in 64 bits")
DRAFT = Integers(0, MAX_DRAFTS, f"it must be 0 to {MAX_DRAFTS} or auto")
MAX_DRAFT = Integers(0, MAX_DRAFTS, f"it must be 0 to {MAX_DRAFTS}")
TEMPERATURE = Numbers(0, math.inf, "it must be finite and at least 0 (0 takes the most likely token)")
TOP_P = Numbers(0, 1, "it must be above 0 and at most 1", above=True)
MIN_P = Numbers(0, 1, "it must be between 0 and 1")


def flag(field: str, value: Any) -> bool:
    """True or False, of Python, numpy or JAX, as a Python bool.

    Raises:
        InputError: another value; the message names the field.
    """
    if not is_flag(value):
        raise InputError(f"{field} is {shown(value)}; it must be True or False")
    return bool(value)


def is_flag(value: Any) -> bool:
    """Whether a value is True or False, of Python, numpy or JAX."""
    return isinstance(value, bool) or (str(getattr(value, "dtype", "")) == "bool" and getattr(value, "ndim", None) == 0)


def shown(value: Any) -> str:
    """Any value as text for a one-line message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
