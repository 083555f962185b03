"""Many requests at once, each with the tokens and fingerprints that it has alone."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

import ds4jax
from ds4jax import bounds
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.named import name_of
from ds4jax.device import processor
from ds4jax.engine.costs import engine_costs
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.prefill import call_bytes
from ds4jax.engine.prefix import PrefixCache
from ds4jax.engine.prefix_folder import PrefixFolder
from ds4jax.engine.request import Request
from ds4jax.engine.scheduler import Scheduler
from ds4jax.engine.shape import SLOTS, Shape, state_bytes
from ds4jax.engine.slots import Slots
from ds4jax.engine.wish import Wish
from ds4jax.errors import InputError
from ds4jax.loading.plan import GB, free_bytes
from ds4jax.text.prompt import Prompt

WAITING = 1024
PREFIX_BYTES = 2_000_000_000
PREFIX_FOLDER_BYTES = 20_000_000_000


class Engine:
    """Runs many requests at once in one compiled loop.

    The tokens and fingerprints of a request are those of the same request alone in a new engine with the same options, whatever
    else runs, in whichever order requests come, are cancelled or fail. One thread of the engine uses the device.

    Options that bits depend on are in `fingerprint`, and the number of slots is one of them: on a CPU, XLA's sums of 1, 2, 4 and
    8 slots differ in the last bits (in strict mode those of 4 and 8 were equal).

    Leaving a `with` block waits for the requests; after an exception it ends them.

    Attributes:
        model: the model.
        context: maximum tokens of a request, prompt and reply.
        chunk: rows of the widest call that appends a prompt. It depends on the device's kind, the model and the options alone.
    """

    def __init__(
        self,
        model: Loaded,
        *,
        slots: int = SLOTS,
        context: int | None = None,
        strict: bool = False,
        chunk: int | None = None,
        drafter: Drafter | None = None,
        waiting: int = WAITING,
        prefix_bytes: int = PREFIX_BYTES,
        prefix_folder: str | os.PathLike[str] | None = None,
        prefix_folder_bytes: int = PREFIX_FOLDER_BYTES,
        slots_of: Callable[[Loaded, Shape], Slots] = Slots,
    ):
        """Start the thread and compile the programs.

        Args:
            slots: S, the number of requests that run at once; a multiple of the model's groups of devices.
            context: by default the smaller of 8,192 and the model's context.
            strict: float32 products without Pallas kernels.
            chunk: maximum rows of a call that appends a prompt, at least 32; by default as many as the device's memory allows
                beside the weights, up to 4,096, and 128 on a CPU. While a call runs, no other request gets a token.
            drafter: the drafter; by default the model's MTP block.
            waiting: maximum number of requests that wait for a slot.
            prefix_bytes: maximum bytes of host memory for beginnings of prompts that may come again; 0 keeps none.
            prefix_folder: a folder that keeps them for the next process, too; it may be deleted any time.
            prefix_folder_bytes: maximum bytes of its files.
            slots_of: makes the slots; another one has `ds4jax.processes.slots`.

        Raises:
            InputError: an option is outside its range, the model has no drafter, or the folder cannot be made.
        """
        self.shape, self.context = Shape.of(model, slots=slots, context=context, strict=strict, chunk=chunk, drafter=drafter)
        self.model, self.chunk = model, self.shape.chunk
        _require_fit(model, self.shape, self.context)
        made = slots_of(model, self.shape)
        store = None
        if prefix_folder is not None:
            most_stored = bounds.BYTES.checked("prefix-folder-bytes", prefix_folder_bytes)
            likes = [made.chunk_shapes(width) for width in self.shape.kept]
            store = PrefixFolder(Path(prefix_folder), identity=self.fingerprint, likes=likes, maximum=most_stored)
        ahead, kept = int(self.shape.drafter is not None), bounds.BYTES.checked("prefix-bytes", prefix_bytes)
        prefix = PrefixCache(ahead=ahead, maximum=kept, store=store)
        self._scheduler = Scheduler(made, prefix, bounds.WAITING.checked("waiting", waiting))
        self._forget = weakref.finalize(self, Scheduler.close, self._scheduler, cancel=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(cancel=kind is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait until all have ended; `cancel` ends them now."""
        self._forget.detach()
        self._scheduler.close(cancel=cancel)

    def submit(self, prompt: Prompt, **options: Any) -> Request:
        """Append a request to the queue. Iterate over it for pieces, or wait for its result.

        Args:
            prompt: text or token ids.
            options: `max_new_tokens`; `sampling`, a `ds4jax.Sampling`, which with
                seed None gets a seed of its own; `draft`, drafts per step, or "auto"; `stop`, texts and
                token ids that end the reply; `ignore_eos`; `logprobs`, the number of most likely tokens that are noted with each
                token; `constraint`, a function of the tokens so far that says which may follow, as
                `ds4jax.engine.wish.Constraint`.

        Raises:
            InputError: the prompt is empty, leaves no room in the context or is outside the vocabulary; or an option is outside
                its range.
            QueueFull: too many requests wait.
            Closed: the engine was closed.
        """
        ids_T = self.model.encode(prompt)
        room = self.context - len(ids_T)
        if room < 1:
            raise InputError(f"prompt has {len(ids_T)} tokens; the engine's context of {self.context} must hold a reply, too")
        wish = Wish.of(self.model, room, **options)
        drafter = name_of(self.shape.drafter)
        request = Request(self.model, ids_T, wish, drafter=drafter, strict=self.shape.strict, wake=self._wake)
        self._scheduler.submit(request)
        return request

    def _wake(self) -> None:
        """A request holds the engine by this method, so that an engine lives as long as its requests."""
        self._scheduler.wake()

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return self._scheduler.waiting

    @property
    def drafts(self) -> np.ndarray:
        """int64 [S, 2]: the numbers of drafts, and of those that stood, of each slot since the start."""
        return self._scheduler.drafts

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix cache in memory."""
        return self._scheduler.prefix_bytes

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._scheduler.alive

    @property
    def error(self) -> BaseException | None:
        """What ended the engine by itself, such as an `ExchangeError`."""
        return self._scheduler.error

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of everything that a reply's bits depend on, besides the request: 32 hexadecimal digits.

        Weights, versions, kind and number of devices and groups, slots, context, chunk, type of cache, strict and drafter. Equal
        fingerprints and equal requests have equal replies.
        """
        return hashlib.sha256(json.dumps(self._mode(), sort_keys=True).encode()).hexdigest()[:32]

    def _mode(self) -> dict[str, Any]:
        model, shape, device, mesh = self.model, self.shape, jax.devices()[0], self.model.graph.mesh
        return {
            "weights": model.fingerprint,
            "ds4jax": ds4jax.__version__,
            "jax": jax.__version__,
            "device": f"{device.platform} {device.device_kind} {processor() if device.platform == 'cpu' else ''}",
            "environment": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "DS4JAX_NO_SHARE_WARP")},
            # On a CPU they change no bit. On GPUs that is not shown for the prefill. How they exchange outputs changes none: that
            # only moves bits.
            **({"devices": mesh.size} if mesh and device.platform != "cpu" else {}),
            **({"groups": shape.groups} if shape.groups > 1 and device.platform != "cpu" else {}),
            "slots": shape.slots,
            "capacity": shape.capacity,
            "widths": shape.widths,
            "strict": shape.strict,
            "max_draft": model.max_draft,
            "drafter": repr(shape.drafter),
            # Depths that are automatic depend on them, and with them what is drawn.
            "costs": engine_costs(model, strict=shape.strict, drafter=shape.drafter),
        }


def _require_fit(model: Loaded, shape: Shape, context: int) -> None:
    """Refuse slots that take more memory than the device has free.

    Raises:
        InputError: the message says how many would fit.
    """
    free = free_bytes()
    if free is None:
        return
    kernels = jax.devices()[0].platform != "cpu"
    calls = call_bytes(model.config, shape.chunk, shape.capacity, kernels=kernels)
    # Groups on a CPU share its memory.
    parts = shape.groups if kernels else 1
    state = state_bytes(model, shape) * shape.groups // parts
    if state + calls > free:
        fitting = max(free - calls, 0) * (shape.slots // parts) // state * parts
        raise InputError(
            f"slots: {shape.slots} with a context of {context:,} need {(state + calls) / GB:.2f} GB beside the weights, "
            f"{free / GB:.2f} GB are free; {fitting - fitting % shape.groups} would fit"
        )
