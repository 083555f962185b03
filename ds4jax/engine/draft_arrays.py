"""DSpark blocks after chosen positions of a scored sequence, as arrays for a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds4jax import bounds
from ds4jax.config import Config
from ds4jax.decode.module import Graph, Weights
from ds4jax.decode.scoring import Block, draft_block
from ds4jax.errors import InputError


def draft_positions(config: Config, name: str, positions: Sequence[int], total: int) -> list[int]:
    """Check positions of a sequence of `total` tokens; `name` is the model's.

    Raises:
        InputError: a position is outside the sequence, or the model has no DSpark block.
    """
    checked = [bounds.POSITION.checked("draft-at", position) for position in positions]
    if checked and not config.n_dspark:
        raise InputError(f"{name}: draft-at: these weights have no DSpark block")
    if checked and max(checked) >= total:
        raise InputError(f"draft-at is {max(checked)}; the last of {total} tokens is at {total - 1}")
    return checked


def draft_arrays(
    graph: Graph, weights: Weights, window: int, scored: dict[str, np.ndarray], means_TLD: np.ndarray, positions: list[int],
    *, strict: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Draft greedily after each of A positions.

    Args:
        graph, weights: of the model, see `ds4jax.decode.module`.
        window: the config's.
        scored: `ids` int32 [T] and `logits` float32 [T, V].
        means_TLD: float32 [T, L, D], for each row the means of the streams after the L tapped layers.

    Returns:
        `draft_at` int32 [A]; `draft_anchor` int32 [A], the token after each, at the last position the model's own choice;
        `draft_base_logits` and `draft_logits` float32 [A, K, V], before and after the correction by the token before;
        `draft_tokens` int32 [A, K]; `draft_confidence` float32 [A, K].
    """
    ids_T = scored["ids"]
    following = np.append(ids_T[1:], np.argmax(scored["logits"][-1])).astype(np.int32)
    made: list[Block] = []
    for position in positions:
        first = max(position + 1 - window, 0)
        rows_WLD = np.zeros((window, *means_TLD.shape[1:]), np.float32)
        rows_WLD[: position + 1 - first] = means_TLD[first : position + 1]
        means = [rows_WLD[:, i] for i in range(rows_WLD.shape[1])]
        numbers = np.int32(first), np.int32(position + 1 - first), following[position]
        made.append(draft_block(graph, weights, means, *numbers, strict=strict))
    arrays = {f"draft_{name}": np.stack([np.asarray(getattr(block, name)) for block in made]) for name in Block._fields}
    return {"draft_at": np.array(positions, np.int32), "draft_anchor": following[positions]} | arrays
