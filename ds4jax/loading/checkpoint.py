"""What every loader returns: the configuration and a list of tensors that have not been read yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ds4jax.config import Config
from ds4jax.loading.reading import Reading
from pallas_kernels.formats import FORMATS, Quantized

if TYPE_CHECKING:
    from ds4jax.tokenizer import Tokenizer


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
        start: prepares to read it onto the default device; reading raises InputError where the stored values cannot be used.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    form: str
    nbytes: int
    device_nbytes: int
    start: Callable[[], Reading]

    def read(self) -> jax.Array | Quantized:
        """Read it now, in this thread; the device may still be at work on the value that is returned."""
        return self.start().value()

    @property
    def abstract(self) -> Any:
        """What `read` returns with `jax.ShapeDtypeStruct` in place of arrays; nothing is read."""
        if self.form not in FORMATS:
            return jax.ShapeDtypeStruct(self.shape, _PLAIN[self.form])
        format, (*lead, columns) = FORMATS[self.form], self.shape
        stored = jax.ShapeDtypeStruct((*lead, columns // format.BLOCK, format.BLOCK_BYTES), jnp.uint8)
        return jax.eval_shape(format.split, stored)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model: headers were read and every name, type and shape agrees with the configuration.

    Attributes:
        kind: "gguf" or "hub".
        tensors: every parameter of the model once, in the order in which reading them is fastest.
        tokenizer: None where the files hold none.
        metadata: what the files say beyond tensors, by key.
        ignored: tensors in the files that the model has no use for.
        mtp_path: the file that holds the MTP block, where it is not the model's own.
        no_mtp: why the model has no MTP block, a phrase for a message that begins with the path; empty where it has one.
    """

    path: Path
    kind: str
    config: Config
    tensors: tuple[Tensor, ...]
    tokenizer: Tokenizer | None
    metadata: dict[str, Any]
    ignored: tuple[str, ...] = ()
    mtp_path: Path | None = None
    no_mtp: str = ""
