"""The time to the first token: its parts are what they are called, and add up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from ds4jax import timing as startup
from ds4jax.timing import PARTS, Startup, process_began


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


# Says it some time after its start: when it was imported would be another answer.
WHEN = "import time; time.sleep(0.3); from ds4jax.timing import process_began; print(process_began())"


def test_a_process_began_when_it_was_started():
    """The clock is the machine's, and the system counts in hundredths of a second."""
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", WHEN], stdout=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        began = float(process.communicate()[0])
    assert before - 0.02 <= began <= started + 0.02


def stat_of(seconds_ago: float) -> str:
    """A line as the system writes it of a process with an odd name that began so long ago."""
    ticks = (time.clock_gettime(time.CLOCK_BOOTTIME) - seconds_ago) * os.sysconf("SC_CLK_TCK")
    fields = ["S", *["7"] * (startup._START_FIELD - 1), f"{ticks:.0f}"]
    return f"12 (name with ) in it) {' '.join(fields)} 7 7"


def test_the_start_is_read_behind_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "_IMPORTED", time.monotonic())
    (tmp_path / "stat").write_text(stat_of(50))
    assert process_began(tmp_path / "stat") == pytest.approx(time.monotonic() - 50, abs=0.1)


@pytest.mark.parametrize(
    "content", [None, "", "1 (a) b", "12 (name with ) in it) S 1 x", pytest.param(stat_of(-1000), id="future")]
)
def test_where_no_system_tells_when_it_began_imports_do(tmp_path, content):
    """Nor where a clock of another kind says that it begins in the future."""
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    assert process_began(stat) == startup._IMPORTED
