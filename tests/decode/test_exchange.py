"""A word that is missing in a mailbox ends the loop, the request and the engine, in one line."""

from __future__ import annotations

import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine
from small_models import shallow_model, text

from ds4jax.cli import main as cli
from ds4jax.decode import exchange
from ds4jax.engine.host_copy import HostCopy
from ds4jax.engine.scheduler import Closed
from ds4jax.errors import ExchangeError
from pallas_kernels.linear.mailbox_gather import Mail

MAIL = Mail(jnp.zeros((2, 2), jnp.int32), jnp.zeros(1, jnp.int32), 8)
MESSAGE = "device 1: 5 words of its outputs did not come to the first device, so this process cannot go on; start it again"


def lost_report() -> jax.Array:
    """The report of two sequences of a call in which the first device did not get five words of device 1."""
    return exchange.marked(jnp.arange(18, dtype=jnp.int32).reshape(2, 9), jnp.array([5, 2], jnp.int32))


@pytest.mark.parametrize(("at", "steps"), [(3, 3), (100, 7)])
def test_the_loop_ends_after_the_step(at: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(mail: Mail, after: jax.Array) -> jax.Array:
        assert mail is MAIL
        return jnp.where(after >= at, jnp.array([5, 2], jnp.int32), 0)

    monkeypatch.setattr(exchange, "lost", lost)
    made, missing = exchange.repeated(MAIL, lambda i: i < 7, lambda i: i + 1, jnp.int32(0), lambda i: i)
    assert int(made) == steps
    assert missing is not None
    assert missing.tolist() == ([5, 2] if at < 7 else [0, 0])


def test_a_loop_without_mailboxes_is_the_loop_alone() -> None:
    made, missing = exchange.repeated(None, lambda i: i < 7, lambda i: i + 1, jnp.int32(0), lambda i: i)
    report = jnp.arange(9)
    assert (int(made), missing) == (7, None)
    assert exchange.marked(report, None) is report


def test_a_report_says_what_is_missing() -> None:
    whole = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    np.testing.assert_array_equal(exchange.checked(np.array(exchange.marked(whole, jnp.zeros(2, jnp.int32)))), whole)
    with pytest.raises(ExchangeError, match=f"^{re.escape(MESSAGE)}") as caught:
        exchange.checked(np.array(lost_report()))
    assert "\n" not in str(caught.value)


def test_a_continuation_raises_it() -> None:
    host = HostCopy(0)
    with pytest.raises(ExchangeError, match="device 1"):
        host.read(None, lost_report()[:1])  # type: ignore[arg-type]
    assert host.tokens == []


@pytest.mark.long
def test_every_request_of_an_engine_says_it_and_the_engine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other faults end the requests of a call, see `test_engine.py`; this one also those that wait, and later ones."""
    with engine(slots=2) as one:
        slots = one._scheduler._slots
        programs = slots.compiled()

        submitted = threading.Event()

        def failing(*arguments: Any) -> tuple[Any, jax.Array, Any]:
            assert submitted.wait(60)
            state, report, scores = programs["call"](*arguments)
            return state, exchange.marked(report, jnp.array([5, 2], jnp.int32)), scores

        monkeypatch.setattr(slots, "compiled", lambda: programs | {"call": failing})
        requests = [one.submit(text(start, 40), max_new_tokens=20) for start in (0, 40, 60)]
        submitted.set()
        for request in requests:
            with pytest.raises(ExchangeError, match=re.escape(MESSAGE)):
                request.result(60)
        assert not one.alive
        assert isinstance(one.error, ExchangeError)
        with pytest.raises(Closed):
            one.submit(text(0, 40), max_new_tokens=20)


@pytest.mark.long
def test_a_command_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(report_SN: np.ndarray) -> np.ndarray:
        return exchange.checked(np.array(lost_report()))

    monkeypatch.setattr("ds4jax.engine.host_copy.checked", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "In the beginning", "--max-new-tokens", "2"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"ds4jax: error: {MESSAGE}")


def test_a_model_on_one_device_exchanges_nothing() -> None:
    model = shallow_model()
    assert (model.exchange.name, model.exchange.words, model.graph.words) == ("collective", 0, 0)
    assert len(model.arrays) == model.graph.structure.num_leaves
