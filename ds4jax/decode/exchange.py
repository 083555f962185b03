"""How the devices of a cut model exchange outputs in a decode step: by mailboxes where the gate allows it, else by collectives.

A word that is missing in a mailbox must not become a wrong number. The loop ends after the step, and its report says `LOST`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.cache.state import Cache
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.named import name_of
from ds4jax.decode.module import Weights, mail_of, merged
from ds4jax.decode.width import step_rows
from ds4jax.errors import ExchangeError
from ds4jax.model import decode_kernels, paths
from ds4jax.model.transformer import Transformer
from pallas_kernels.linear.mailbox_gather import Mail, lost

Carry = TypeVar("Carry")
# The count of tokens in the report of a call whose outputs cannot be used. Then come a device and a number of words.
LOST = -1


def mail_for(
    graph: nnx.GraphDef, weights: Weights, cache: Cache, drafter: Drafter | None, max_draft: int, *, strict: bool
) -> Mail | None:
    """The mailboxes that the steps of a program use; None if they use collectives, see `paths.why_not_mail`."""
    mail, sequences = mail_of(graph, weights), cache.length.shape[0]
    if mail is None:
        return None
    # The program's model may have another MTP block than the one that was loaded.
    model, name = merged(graph, weights), name_of(drafter)
    # A DSpark block has rows of its own.
    rows = max(step_rows(max_draft, sequences), model.config.dspark_block if name.startswith("dspark") else 0)
    reason = paths.why_not_mail(sequences * rows, name, strict=strict) or why_not_mailboxes(model)
    return None if reason else mail


def why_not_mailboxes(model: Transformer) -> str | None:
    """Why decode steps of a model cannot gather outputs by mailboxes, see `paths.why_not_mailboxes`; None when they can."""
    stages = model.dspark.stages if model.dspark else ()
    blocks = map(decode_kernels.weights_of, (*model.layers, *model.mtp, *stages))
    return paths.why_not_mailboxes(model.config, blocks, model.head.weight.get_value())


def repeated(
    mail: Mail | None, more: Callable[[Carry], jax.Array], one: Callable[[Carry], Carry], carry: Carry,
    after: Callable[[Carry], jax.Array],
) -> tuple[Carry, jax.Array | None]:  # fmt: skip
    """`jax.lax.while_loop` that also ends after a step in which a word was missing.

    Args:
        after: an array of the carry to which the step's gathers led.

    Returns:
        The carry, and the missing words of this device, see `mailbox_gather.lost`; None without mailboxes.
    """
    if mail is None:
        return jax.lax.while_loop(more, one, carry), None

    def watched(both: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        made = one(both[0])
        return made, lost(mail, after(made))

    begun = carry, jnp.zeros(2, jnp.int32)
    return jax.lax.while_loop(lambda both: (both[1][0] == 0) & more(both[0]), watched, begun)


def marked(report_SN: jax.Array, missing: jax.Array | None) -> jax.Array:
    """The report of a call, or one that says which words were missing."""
    if missing is None:
        return report_SN
    numbers = jnp.stack([jnp.int32(LOST), missing[1] - 1, missing[0]])
    says = jnp.zeros_like(report_SN).at[:, :3].set(numbers)
    return jnp.where(missing[0] > 0, says, report_SN)


def checked(report_SN: np.ndarray) -> np.ndarray:
    """The report of a call on the host.

    Raises:
        ExchangeError: words were missing.
    """
    if report_SN[0, 0] == LOST:
        device, count = report_SN[0, 1:3].tolist()
        raise ExchangeError(
            f"device {device}: {count} words of its outputs did not come to the first device, so this process cannot go on; "
            "start it again, and with exchange collective if this comes back"
        )
    return report_SN
