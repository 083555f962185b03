"""Which drafter goes with a model: its own, a file that the user names, or a file beside it that was made for these weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ds4jax.bounds import SHIPPED_DSPARK
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading import mtp_file
from ds4jax.loading.drafter_choice import NOT_WANTED, WITH_DSPARK, WITHOUT, kinds, lacking, require_no_file
from ds4jax.loading.drafter_metadata import difference, dspark_ratios, other_ratios, with_dspark
from ds4jax.loading.dspark_file import read_dspark
from ds4jax.loading.dspark_names import Dspark
from ds4jax.loading.gguf_config import read_config
from ds4jax.loading.gguf_header import Header, shown
from ds4jax.loading.gguf_match import Drafter, match_drafter
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.lineage import other_copies, other_lineage
from ds4jax.loading.mtp_names import block_in, drafter

# Embeddings and heads: one row for each token of the vocabulary.
_TABLE = re.compile(r"(^|\.)(token_embd|output|embed|head|embed_tokens|shared_head_head)\.weight$")


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What drafts for a model.

    Attributes:
        kind: as `Checkpoint.drafter`.
        drafter: the MTP block or the DSpark drafter, in the model's file or in one of its own; None for other kinds.
        no_mtp, warning: as in `Checkpoint`.
    """

    kind: str
    drafter: Drafter | None = None
    no_mtp: str = ""
    warning: str = ""

    def side(self, model: Header) -> Header | None:
        """The file of the drafter; None where there is none, or where it is in the model's."""
        return None if self.drafter is None or self.drafter.header is model else self.drafter.header

    def config(self, model: Header) -> Config:
        """The configuration of a model with this drafter.

        Raises:
            InputError: as for `read_config`, or the drafter's own numbers do not go with the model.
        """
        return _config(model, self.drafter)


def pair(model: Header, path: Path | None, wanted: str = "auto") -> Pairing:
    """Decide what drafts for a model.

    Args:
        path: the drafter's file that the user names. It replaces a drafter inside the model, and origins that differ are only a
            warning. None takes the model's own, or else searches the model's folder.
        wanted: the kind, as for `ds4jax.load`.

    Raises:
        InputError: the named file cannot be used, several files beside the model can be, the DSpark drafter inside the model is
            broken, or there is no drafter of the wanted kind.
    """
    if not kinds(wanted):
        require_no_file(wanted, path)
        return Pairing(wanted, no_mtp=NOT_WANTED)
    if path is not None:
        return _named(model, path, wanted)
    own = drafter(model.tensors)
    if own == "dspark" and own in kinds(wanted):
        return _inside(model)
    beside, reasons = _searched(model, [kind for kind in kinds(wanted) if kind != own])
    found = [one for one in kinds(wanted) if one == own or one in beside]
    if not found:
        reason = "; ".join(reasons)
        if wanted != "auto":
            raise InputError(f"{model.path}: {lacking(wanted, reason)}")
        return Pairing("none", no_mtp=reason or mtp_file.no_block(model.tensors, mtp_file.NONE))
    kind, broken = found[0], [reason for reason in reasons if mtp_file.BROKEN in reason]
    made = beside[kind] if kind in beside else block_in(model)
    return Pairing(kind, made, WITH_DSPARK if kind == "dspark" else "", "; ".join(broken))


def _inside(model: Header) -> Pairing:
    """The DSpark drafter among the model's own tensors."""
    try:
        found = read_dspark(model)
        match_drafter(_config(model, found), found)
    except InputError as error:
        raise InputError(f"{error}; {WITHOUT}") from error
    return Pairing("dspark", found, WITH_DSPARK)


def _named(model: Header, path: Path, wanted: str) -> Pairing:
    side = open_side(path)
    kind = kind_of(side)
    if kind not in kinds(wanted):
        raise InputError(f"{path}: drafter file: it holds {mtp_file.WHAT[kind]}, and drafter is {wanted}")
    wrong = _misfit(model, side)
    if wrong:
        raise InputError(f"{path}: {wrong}")
    # The package ships this file with its model, whose ratios are those of its MTP block.
    doubt = "" if path == SHIPPED_DSPARK else _doubt(model, side)
    own = drafter(model.tensors)
    said = [f"{path.name} was made for other weights ({doubt}); it is used because it was given"] if doubt else []
    if own and path != SHIPPED_DSPARK:
        said.append(f"{mtp_file.INSIDE[own]} inside the model is not used, because {path.name} was given")
    return Pairing(kind, side, WITH_DSPARK if kind == "dspark" else "", "; ".join(said))


def open_side(path: Path) -> Drafter:
    """The drafter in a file that the user names.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    header = mtp_file.open_alone(path)
    return read_dspark(header) if mtp_file.is_dspark(header) else mtp_file.support(header)


def kind_of(found: Drafter) -> str:
    """The kind of a drafter, "mtp" or "dspark"."""
    return "dspark" if isinstance(found, Dspark) else "mtp"


def _searched(model: Header, wanted: list[str]) -> tuple[dict[str, Drafter], list[str]]:
    """The drafter of each wanted kind that a file beside the model holds, and why other files are not used."""
    found: dict[str, list[Drafter]] = {}
    reasons: list[str] = []
    for path in mtp_file.beside(model.path) if wanted else ():
        where = f"{path.name}, which lies beside {'it' if len(model.shards) == 1 else 'them'}, "
        try:
            header = open_set(path)
            kind = "dspark" if mtp_file.is_dspark(header) else "mtp"
            if kind not in wanted:
                continue
            side = read_dspark(header) if kind == "dspark" else mtp_file.side_block(header)
            wrong = (_misfit(model, side) or _doubt(model, side)) if side is not None else ""
        except InputError as error:
            reasons.append(f"{where}{mtp_file.BROKEN}: {str(error).removeprefix(f'{path}: ')}")
            continue
        if wrong:
            reasons.append(f"{where}belongs to other weights ({wrong})")
        elif side is not None:
            found.setdefault(kind, []).append(side)
    return {kind: _only(model, kind, sides) for kind, sides in found.items()}, reasons


def _only(model: Header, kind: str, sides: list[Drafter]) -> Drafter:
    """The one file of a kind, or the one that is named after the model."""
    if len(sides) > 1:
        sides = [side for side in sides if mtp_file.is_named_after(side.header.path, model.path)] or sides
    if len(sides) > 1:
        names = " and ".join(side.header.path.name for side in sides[:2])
        raise InputError(f"{model.path}: {kind} file: {names} both lie beside it; say which one to use by --drafter-file")
    return sides[0]


def _config(model: Header, found: Drafter | None) -> Config:
    if isinstance(found, Dspark):
        return with_dspark(read_config(model), found)
    config = read_config(model, None if found is None or found.header is model else found)
    return config if found is not None else dataclasses.replace(config, n_mtp=0)


def _misfit(model: Header, side: Drafter) -> str:
    """A phrase that says why a drafter cannot run with a model; empty where it can."""
    config, header = read_config(model), side.header
    if not isinstance(side, Dspark) and side.layer is not None and side.layer != config.n_layers:
        return f"blk.{side.layer}.nextn: {model.path.name} has {config.n_layers} layers"
    for name, info in header.tensors.items():
        if _TABLE.search(name) and info.shape != (config.vocab_size, config.dim):
            shape, ours = list(info.shape[::-1]), [config.dim, config.vocab_size]
            return f"{shown(name)}: dimensions {shape}, and {ours} in {model.path.name}"
    wrong = difference(model, side)
    if wrong:
        return wrong
    try:
        match_drafter(_config(model, side), side)
    except InputError as error:
        return str(error).removeprefix(f"{header.path}: ")
    return ""


def _doubt(model: Header, side: Drafter) -> str:
    """A phrase that says why a drafter was probably made for other weights; empty where nothing says so."""
    ratios = dspark_ratios(model, side) if isinstance(side, Dspark) else other_ratios(model, side.header)
    return ratios or other_lineage(model, side.header) or other_copies(model, side)
