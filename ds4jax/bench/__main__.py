"""`python -m ds4jax.bench suite`: everything that a bare GPU machine can show, from a checkout, without installing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ds4jax.bench import environment
from ds4jax.bench.environment import ROOT
from ds4jax.errors import InputError

PROBE = "import jax; print(jax.default_backend()); print(jax.devices()[0].device_kind)"
# Of plugins that happen to be installed, pytest-benchmark warns of workers, and warnings are errors here.
PLUGINS = ("-p", "no:cacheprovider", "-p", "no:benchmark")
LOAD_BYTES = 4_000_000_000
TESTS = ("-m", "pytest", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib", *PLUGINS, "-v", "-rs")

DESCRIPTION = """\
Run one part's benchmarks and bit-equality checks, then its tests marked gpu. Exit code 1 when a test fails, a bit differs or
something could not be measured; 2 where there is no GPU."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line, whatever the message holds, and exit with 2."""
        line = " ".join(message.splitlines())
        self.exit(2, f"ds4jax.bench: error: {line}\n")


def folder(word: str) -> Path:
    """A folder that is there or can be made. An argparse type."""
    path = Path(word)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: {error.strerror or error}") from None
    return path


def progress() -> Callable[[str], None]:
    """A function that prints seconds since now and a message to stderr."""
    start = time.monotonic()
    return lambda message: print(f"{time.monotonic() - start:6.1f} s  {message}", file=sys.stderr, flush=True)


def device_kind() -> str:
    """The GPU's name as jax gives it, asked in a process of its own, which leaves the GPU's memory free.

    Raises:
        InputError: jax has no GPU.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) < 2:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"bench: jax does not start: {reason}")
    if lines[0] != "gpu":
        raise environment.no_gpu(lines[0])
    return lines[1]


def gpu_tests(path: Path, tests: Sequence[str]) -> bool:
    """Run the gpu tests among `tests` in a fresh process and keep what it prints; True when some passed and none failed."""
    # Where the GPU cannot be started the tests must fail, not fall back to the CPU and be skipped there.
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cuda,cpu"}
    with path.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *TESTS, *tests], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | settings
        )
    text = path.read_text(encoding="utf-8", errors="replace").replace(f"{ROOT}/", "")
    text = text.replace(str(ROOT), "<checkout>").replace(sys.prefix, "<python>")
    path.write_text(text, encoding="utf-8")
    return done.returncode == 0 and passed(text)


def passed(text: str) -> bool:
    """Whether pytest's last line counts a test that passed."""
    lines = text.strip().splitlines()
    return bool(lines and re.search(r"\b[1-9]\d* passed", lines[-1]))


def _start_gpu() -> None:
    """Set this process up for a part that computes."""
    from ds4jax import runtime

    runtime.configure()
    environment.require_gpu()


def kernels_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Times and bits of the kernels on every product of V4-Flash; writes `<slug>-kernels.json` and prints a table."""
    _start_gpu()
    from ds4jax.bench import bits, report
    from ds4jax.bench.kernels import ROWS, Bench
    from pallas_kernels.shapes import FLASH

    bandwidth = environment.copy_gbps()
    note(f"copy {bandwidth:.0f} GB/s")
    found = Bench(FLASH, ROWS, bandwidth, check_bits=True).run(note)
    content = report.document(environment.describe(), bandwidth, found.rows, found.bits, found.problems)
    report.write(out / f"{slug}-kernels.json", content)
    report.show(content)
    return bits.equal(found.bits) and not found.problems


def decode_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """The decode step of the whole of V4-Flash; writes `<slug>-decode.json`, `.png` and `-decode-profile.txt`, prints tables."""
    _start_gpu()
    from ds4jax.bench import decode, decode_report, report

    content = decode.bench(decode.Options(strict=True, acceptance=(0.79, 0.58)), note)
    report.write(out / f"{slug}-decode.json", content)
    decode_report.write_profile(out / f"{slug}-decode-profile.txt", content)
    if importlib.util.find_spec("matplotlib") is None:
        note("no picture: matplotlib is not installed")
    else:
        decode_report.plot(out / f"{slug}-decode.png", content)
    decode_report.show(content)
    return decode.good(content)


def load_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """The load rate of a file of 4 GB beside `cat` and a page-locked copy; writes `<slug>-load.json` and prints it."""
    _start_gpu()
    from ds4jax.bench import load, report

    content = {**environment.describe(), **load.measure(LOAD_BYTES, note)}
    report.write(out / f"{slug}-load.json", content)
    load.show(content)
    return load.enough(content)


def prefill_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Prompts of 4,096 and 32,768 tokens through the whole of V4-Flash; writes `<slug>-prefill.json` and prints tables."""
    _start_gpu()
    from ds4jax.bench import prefill, report

    content = prefill.bench(prefill.Options(), note)
    report.write(out / f"{slug}-prefill.json", content)
    prefill.show(content)
    return prefill.good(content)


def long_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Plain decode of V4-Flash from 2 thousand to a million rows with either cache; writes `<slug>-long.json`, prints a table."""
    _start_gpu()
    from ds4jax.bench import long, report
    from ds4jax.config import CACHES

    content = long.bench(long.Options(caches=CACHES), note)
    report.write(out / f"{slug}-long.json", content)
    long.show(content)
    return long.good(content)


def start_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """The first token of a process with the whole of V4-Flash, cold and warm; writes `<slug>-start.json` and prints it."""
    from ds4jax.bench import report, start

    measured = start.measure(start.Options(), note)
    content = {**environment.describe(), **measured}
    report.write(out / f"{slug}-start.json", content)
    start.show(content)
    return True


PREFILL = (
    "tests/kernels/test_attention_prefill.py",
    "tests/kernels/test_grouped_matmul.py",
    "tests/kernels/test_dispatch.py",
    "tests/model/test_many_rows.py",
)
LONG = ("tests/kernels/test_indexer.py", "tests/kernels/test_narrow.py")
# Kernels' tests that other parts run.
ELSEWHERE = ("tests/kernels/test_gpu.py", *PREFILL, *LONG)


@dataclasses.dataclass(frozen=True)
class Part:
    """What the suite runs at once.

    Attributes:
        measure: given the folder, the device's name for files and a printer of notes, measures and says whether all went well.
        tests: arguments for pytest. Tests that mostly compile share the GPU in several processes.
    """

    measure: Callable[[Path, str, Callable[[str], None]], bool] | None
    tests: tuple[str, ...]


PARTS = {
    "kernels": Part(kernels_part, ("-n", "4", "tests/kernels/test_gpu.py")),
    "decode": Part(decode_part, ("-n", "4", "tests/kernels", *(f"--deselect={file}" for file in ELSEWHERE))),
    "load": Part(load_part, ("-n", "0", "tests/loading/test_memory.py")),
    "prefill": Part(prefill_part, ("-n", "4", *PREFILL)),
    "long": Part(long_part, ("-n", "4", *LONG)),
    "start": Part(start_part, ("-n", "0", "tests/kernels/test_gpu.py", "-k", "golden_activation")),
    "lossless": Part(None, ("-n", "5", "tests/test_lossless.py", "tests/test_tiny_model.py")),
}


def suite(part: str, out: Path) -> int:
    """Run a part, then the tests, which find a quarter of the memory free; returns the exit code.

    Raises:
        InputError: there is no GPU.
    """
    note = progress()
    slug = environment.slug(device_kind())
    chosen = PARTS[part]
    measured = chosen.measure is None or chosen.measure(out, slug, note)
    note("tests marked gpu")
    path = out / f"{slug}-{part}-gpu-tests.txt"
    tested = gpu_tests(path, chosen.tests)
    note(f"tests {'passed' if tested else 'failed'}")
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    if not tested:
        print(*lines[-40:-1], sep="\n")
    print(f"gpu tests: {lines[-1] if lines else 'no output'}")
    note("done")
    return 0 if tested and measured else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    parser = Parser(prog="python -m ds4jax.bench", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    whole = commands.add_parser("suite", help="tests, bits and benchmarks of one part", description=DESCRIPTION)
    whole.add_argument("--part", choices=tuple(PARTS), required=True, help="which part")
    whole.add_argument("--out", type=folder, default="runs/bench", metavar="DIR", help="where the results go (%(default)s)")
    options = parser.parse_args(argv)
    try:
        return suite(options.part, options.out.resolve())
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
