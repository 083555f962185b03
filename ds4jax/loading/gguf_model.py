"""A model in GGUF files, checked by its headers alone: configuration, drafter, and the tensor of every parameter.

Nothing here imports JAX: a file that cannot be used is refused before JAX starts, which takes a second.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.gguf_config import key_of, plain_metadata, read_config
from ds4jax.loading.gguf_header import Header
from ds4jax.loading.gguf_match import Found, match
from ds4jax.loading.gguf_names import contradiction
from ds4jax.loading.mtp_names import drafter as own_drafter
from ds4jax.loading.mtp_names import is_of_drafter
from ds4jax.loading.pairing import Pairing, pair
from ds4jax.text.tokenizer import TOKENS_KEY, VOCAB_SIZE_KEY, Tokenizer


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A model whose names, types and shapes agree with its metadata.

    Attributes:
        header: the model's, of one file or of all shards.
        pairing: what drafts for it.
        found: every parameter with its tensor.
        ignored: names of tensors that the model has no use for.
        tokenizer: None where the files hold none.
    """

    header: Header
    pairing: Pairing
    config: Config
    found: tuple[Found, ...]
    ignored: tuple[str, ...]
    tokenizer: Tokenizer | None

    def in_order(self) -> list[Found]:
        """The parameters in the order of their tensors in the files, in which reading them is fastest."""
        return sorted(self.found, key=lambda one: (one.header is not self.header, one.info.place))


def check_model(header: Header, drafter_file: Path | None = None, drafter: str = "auto") -> GgufModel:
    """Check every name, type and shape in the headers of a model; no tensor is read.

    Args:
        drafter_file: the drafter's own file; None takes the drafter inside the model, or else searches the model's folder.
        drafter: its kind, as for `ds4jax.load`.

    Raises:
        InputError: another architecture, or metadata and tensors that contradict each other; the message names the file and the
            key or tensor.
    """
    # Before anything is said about a drafter, the model itself must be one.
    read_config(header)
    pairing = pair(header, drafter_file, drafter)
    config = pairing.config(header)
    found, ignored = match(header, config, pairing.drafter)
    own = own_drafter(header.tensors)
    if own != pairing.kind and (pairing.kind != "none" or drafter == "none"):
        # A drafter that was not chosen is not unknown.
        ignored = tuple(name for name in ignored if not is_of_drafter(name, config.n_layers))
    wrong = contradiction(config, ignored)
    if wrong is not None:
        raise InputError(f"{header.path}: {key_of(wrong[0])}: {wrong[1]}")
    told = plain_metadata(header) | {VOCAB_SIZE_KEY: config.vocab_size}
    tokenizer = Tokenizer.from_gguf(told, header.path) if TOKENS_KEY in told else None
    return GgufModel(header, pairing, config, tuple(found), ignored, tokenizer)
