"""No two gathers of a step by mailboxes can overlap: each takes what the one before it led to. Read from the traced programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from mesh_steps import FLASH, traced_step

from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.dspark import DSparkDrafter
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.drafters.second_opinion import SecondOpinion
from ds4jax.random_models.checkpoint import config_of
from pallas_kernels.linear import mailbox_gather

LOOPS = ("while", "scan", "cond")
WITH_DSPARK = dataclasses.replace(config_of("flash-0731-q2", 3), n_mtp=0)
WITH_MTP = dataclasses.replace(FLASH, n_mtp=1, compress_ratios=(0, 4, 128, 0))


class Chain:
    """Follows which values depend on the latest gather, in the order of a traced program.

    A loop or a branch with gathers in it counts as one: it begins when all its operands are there, and ends when all of it is
    done, so its operands have to depend on the gather before it.
    """

    def __init__(self) -> None:
        self.count = 0

    def through(self, jaxpr: Any, late: list[bool], since: list[int]) -> tuple[list[bool], list[int]]:
        """Whether each result depends on the latest gather.

        Args:
            late: whether each argument depends on it.
            since: which gather was the latest at that time; a later one makes it void.
        """
        known = {var: (one, at) for var, one, at in zip(jaxpr.invars, late, since, strict=True)}

        def depends(atom: Any) -> bool:
            one, at = (False, -1) if isinstance(atom, jax.extend.core.Literal) else known.get(atom, (False, -1))
            return one and at == self.count

        platforms: dict[Any, Any] = {}
        for eqn in jaxpr.eqns:
            name, found = eqn.primitive.name, [depends(atom) for atom in eqn.invars]
            if name == "platform_index":
                platforms[eqn.outvars[0]] = eqn.params["platforms"]
            if name == "pallas_call":
                out = self._gather(found) if _name(eqn).startswith(mailbox_gather.NAME) else any(found)
            elif name == "cond" and eqn.invars[0] in platforms:
                [chosen] = [i for i, group in enumerate(platforms[eqn.invars[0]]) if group and "cuda" in group]
                body = eqn.params["branches"][chosen].jaxpr
                results, at = self.through(body, found[1:], [self.count] * len(found[1:]))
                known.update(zip(eqn.outvars, zip(results, at, strict=True), strict=True))
                continue
            elif name in LOOPS:
                out = self._apart(eqn, found)
            elif (body := _body(eqn)) is not None:
                results, at = self.through(body, found, [self.count] * len(found))
                known.update(zip(eqn.outvars, zip(results, at, strict=True), strict=True))
                continue
            else:
                out = any(found)
            known.update(dict.fromkeys(eqn.outvars, (out, self.count)))
        return [depends(atom) for atom in jaxpr.outvars], [self.count] * len(jaxpr.outvars)

    def _gather(self, found: list[bool]) -> bool:
        assert self.count == 0 or any(found), f"gather {self.count + 1} does not wait for gather {self.count}"
        self.count += 1
        return True

    def _apart(self, eqn: Any, found: list[bool]) -> bool:
        """A loop or a branch."""
        names = {"while": ("cond_jaxpr", "body_jaxpr"), "scan": ("jaxpr",)}.get(eqn.primitive.name)
        bodies = [eqn.params[one] for one in names] if names else eqn.params["branches"]
        gathers = 0
        for body in bodies:
            inside = Chain()
            inside.through(body.jaxpr, [True] * len(body.jaxpr.invars), [0] * len(body.jaxpr.invars))
            gathers += inside.count
        return self._gather(found) if gathers else any(found)


def _name(eqn: Any) -> str:
    return str(eqn.params.get("name") or eqn.params["name_and_src_info"].name)


def _body(eqn: Any) -> Any:
    """The body of a call, which runs where it stands; None if the equation is no call."""
    body = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    return getattr(body, "jaxpr", body)


def loop_of(jaxpr: Any) -> Any:
    """The body of the program's loop over steps, inside `shard_map`."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            found.append(eqn.params["body_jaxpr"].jaxpr)
        elif (body := _body(eqn)) is not None and eqn.primitive.name != "pallas_call":
            found += loop_of(body)
    return found


@pytest.mark.parametrize(
    ("config", "drafter", "apart"),
    [
        pytest.param(FLASH, None, 0, id="plain"),
        # The loop over deeper drafts and the first draft count as one each, and all drafts of DSpark as one.
        pytest.param(WITH_MTP, MTPDrafter(), 2, id="mtp"),
        pytest.param(WITH_MTP, SecondOpinion(MTPDrafter()), 2, id="mtp+ngram"),
        pytest.param(WITH_DSPARK, DSparkDrafter(), 1, id="dspark"),
        pytest.param(WITH_DSPARK, SecondOpinion(DSparkDrafter()), 1, id="dspark+ngram"),
    ],
)
@pytest.mark.long
def test_each_gather_waits_for_the_one_before(
    config: Any, drafter: Drafter | None, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU traces it: all rows of a step at once."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = traced_step(2, config, mail=True, drafter=drafter, drafts=2 if drafter else 0)
    [step] = loop_of(traced.jaxpr.jaxpr)
    chain = Chain()
    chain.through(step, [True] * len(step.invars), [0] * len(step.invars))
    plain = 4 * config.n_layers + 2
    # The rows of committed tokens: embedding, input and layer of the MTP block, or the rows of DSpark's rings.
    committed = {0: 0, 1: 2 + 4, 2: 1}[config.n_mtp + 2 * bool(config.n_dspark)]
    assert chain.count == plain + committed + apart


def test_a_step_that_forgets_to_wait_is_found() -> None:
    def forgets(x: jax.Array, mail: Any) -> Any:
        [one] = mailbox_gather.gather([x], mail)
        return one, mailbox_gather.gather([2 * x], mail)

    shapes = (jax.ShapeDtypeStruct((2, 8), "float32"), jax.ShapeDtypeStruct((2, 2), "int32"), jax.ShapeDtypeStruct((1,), "int32"))
    traced = jax.jit(lambda x, *of: forgets(x, mailbox_gather.Mail(*of, 16))).trace(*shapes)
    with pytest.raises(AssertionError, match="gather 2 does not wait for gather 1"):
        Chain().through(traced.jaxpr.jaxpr, [True] * 3, [0] * 3)
