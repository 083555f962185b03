"""The time to the first token: its parts are what they are called, and add up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ds4jax import startup
from ds4jax.startup import PARTS, Startup, process_began


def test_parts_follow_each_other_and_compilation_is_taken_out_of_them(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    start = Startup(began=90.0)
    start.begin("plan")
    now = 102.0
    start.begin("load")
    # Two functions traced within a third one: they are part of its four seconds.
    now = 104.0
    start.compiled(0.5)
    now = 105.0
    start.compiled(0.5)
    now = 106.0
    start.compiled(4.0)
    start.begin("prefill")
    now = 107.0
    start.compiled(0.5)
    other = threading.Thread(target=start.compiled, args=(0.25,))
    other.start()
    other.join()
    now = 108.0
    found = start.seconds()
    assert found == {
        "import": 10.0, "plan": 2.0, "load": 0.0, "compile": 4.5, "prefill": 1.5, "decode": 0.0, "other": 0.0, "total": 18.0,
    }  # fmt: skip
    assert sum(found[part] for part in PARTS) == found["total"]


def test_the_process_began_before_what_it_imported():
    age = time.monotonic() - process_began()
    assert 0 < age < 24 * 3600
    assert process_began() <= startup._IMPORTED


@pytest.mark.parametrize("content", [None, "", "1 (a) b", "12 (name with ) in it) S 1 x"])
def test_where_no_system_tells_when_it_began_imports_do(tmp_path, content):
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    assert process_began(stat) == startup._IMPORTED
    assert process_began(Path("/proc/self/stat")) <= startup._IMPORTED
