"""One setting for every test: strict promotion, warnings as errors (pyproject.toml), and one compilation cache for all workers.

Settings go through the environment where a command that a test starts should have them too.
"""

from __future__ import annotations

import collections
import os
import signal
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("DS4JAX_CACHE", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# Several workers share one GPU; the first must not take three quarters of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test that needs these sets them itself.
for name in ("DS4JAX_STRICT", "DS4JAX_NO_SHARE_WARP"):
    os.environ.pop(name, None)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from ds4jax import runtime  # noqa: E402

MOST_MAPPINGS = 20_000

jax.config.update("jax_numpy_dtype_promotion", os.environ["JAX_NUMPY_DTYPE_PROMOTION"])
runtime.configure()

# No deadline: the first example of a shape compiles.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def _reason_to_skip(item: pytest.Item, markexpr: str) -> str | None:
    if item.get_closest_marker("slow") and "slow" not in markexpr:
        return "slow: run it with -m slow"
    if item.get_closest_marker("long") and not markexpr:
        return 'long: CI runs it; run it with -m "not slow"'
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        return f"gpu: jax runs on {jax.default_backend()} here"
    if item.get_closest_marker("weights") and not os.environ.get("DS4JAX_WEIGHTS"):
        return "weights: DS4JAX_WEIGHTS does not name any"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this run did not ask for or this machine cannot do, and say why."""
    for item in items:
        reason = _reason_to_skip(item, config.option.markexpr)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests noted as "summary", and count skipped tests by reason, a line each; `-rs` lists them one by one."""
    for report in terminalreporter.stats.get("passed", []):
        for line in (value for name, value in report.user_properties if name == "summary"):
            terminalreporter.write_line(line)
    if "s" in terminalreporter.reportchars:
        return
    # Where, which line, and "Skipped: " before the reason.
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    for reason, count in collections.Counter(skipped).most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C, here and in processes that the test starts.

    Under `nohup` and in a script's background job the signal is ignored, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs before they are too many: each takes mappings of memory, of which a process may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPPINGS:
        from ds4jax.engine import compile

        compile.forget()
        jax.clear_caches()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
