"""The result of every loader: a configuration and tensors that are not read yet."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ds4jax import bounds
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.drafter_choice import NOT_WANTED, WITH_DSPARK
from ds4jax.loading.gguf_header import shown
from ds4jax.loading.mtp_file import NONE, NONE_INSIDE
from ds4jax.loading.tensor_reader import Reading
from pallas_kernels.formats import FORMATS, Quantized

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer


_PLAIN = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "I32": jnp.int32}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter before it is read.

    Attributes:
        name: its name in the published checkpoint, experts of a layer stacked.
        stored: how the file holds it, "F32", "Q8_0", "F8_E4M3" and so on.
        form: how the device will hold it: "F32", "F16", "BF16", "I32" or a name of `pallas_kernels.formats.FORMATS`.
        nbytes: its bytes in the file.
        device_nbytes: its bytes on the device.
        start: prepares to read it onto the default device, all of it or some rows of the second axis from the end; reading raises
            InputError where the stored values cannot be used.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    form: str
    nbytes: int
    device_nbytes: int
    start: Callable[[slice | None], Reading]

    def read(self) -> jax.Array | Quantized:
        """Read the tensor now, in this thread. The device may still be computing the returned value."""
        return self.start(None).value()

    @property
    def abstract(self) -> Any:
        """What `read` returns with `jax.ShapeDtypeStruct` in place of arrays; nothing is read."""
        return _abstract(self.form, self.shape)


@functools.cache
def _abstract(form: str, shape: tuple[int, ...]) -> Any:
    """As `Tensor.abstract`. Layers repeat shapes, and tracing takes a millisecond."""
    if form not in FORMATS:
        return jax.ShapeDtypeStruct(shape, _PLAIN[form])
    format, (*lead, columns) = FORMATS[form], shape
    stored = jax.ShapeDtypeStruct((*lead, columns // format.BLOCK, format.BLOCK_BYTES), jnp.uint8)
    return jax.eval_shape(format.split, stored)


def note(ignored: Sequence[str], no_mtp: str, warning: str = "") -> str:
    """A phrase about tensors that are not used and a drafter in doubt, for a message that begins with the path; else empty.

    Args:
        ignored, no_mtp, warning: as in `Checkpoint`.
    """
    parts = [f"WARNING: {warning}"] if warning else []
    if ignored:
        count = "1 tensor is" if len(ignored) == 1 else f"{len(ignored):,} tensors are"
        parts.append(f"{count} not used, {shown(ignored[0])}" + (" the first of them" if len(ignored) > 1 else ""))
    if no_mtp not in ("", NONE, NONE_INSIDE, NOT_WANTED, WITH_DSPARK):
        parts.append(f"no drafts: {no_mtp}")
    return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model: headers were read and every name, type and shape agrees with the configuration.

    Attributes:
        kind: "gguf" or "hub".
        tensors: every parameter of the model once, in the order in which reading them is fastest. Two may read one stored tensor.
        files: the files that were opened, and optional ones whether they exist or not.
        tokenizer: None where the files hold none.
        metadata: metadata of the files, by key.
        ignored: tensors in the files that the model has no use for.
        drafter: what drafts: "mtp", "dspark", "ngram" or "none". Only the chosen one's weights are among the tensors.
        second: "+ngram" if n-grams draft where the drafter is unsure, else empty.
        drafter_path: the separate file of the MTP block or DSpark drafter; None where there is none.
        no_mtp: why the model has no MTP block, a phrase for a message that begins with the path; empty where it has one.
        warning: why the drafter that was given may not be right for these weights; empty where nothing says so.
    """

    path: Path
    kind: str
    config: Config
    tensors: tuple[Tensor, ...]
    tokenizer: Tokenizer | None
    metadata: dict[str, Any]
    ignored: tuple[str, ...] = ()
    drafter: str = "none"
    second: str = ""
    drafter_path: Path | None = None
    no_mtp: str = ""
    warning: str = ""
    files: tuple[Path, ...] = ()

    def configured(self, *, qat: bool | None = None, cache: str | None = None) -> Checkpoint:
        """The same model with the user's options; None keeps the model's value. Arguments as for `ds4jax.load`.

        Raises:
            InputError: the model does not support the cache.
        """
        qat = self.config.qat if qat is None else bounds.flag("qat", qat)
        try:
            config = dataclasses.replace(self.config, qat=qat, cache=cache or self.config.cache)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None
        return dataclasses.replace(self, config=config)

    @property
    def opened_with(self) -> str:
        """The name of all that drafts, as for `ds4jax.load`."""
        return self.drafter + self.second

    @property
    def note(self) -> str:
        """`note` of these files."""
        return note(self.ignored, self.no_mtp, self.warning)

    def log_note(self) -> None:
        """Log the note, if there is one: one line on stderr, unless the program configures its log otherwise."""
        if self.note:
            logging.getLogger("ds4jax").warning("%s: %s", self.path, self.note)
