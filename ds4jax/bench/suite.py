"""`ds4jax bench suite`: runs one part's benchmarks and bit comparisons on a GPU, then its tests. Runs from a checkout."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds4jax.bench import environment
from ds4jax.bench.environment import ROOT

# pytest-benchmark, if installed, warns about workers, and warnings are errors here.
PLUGINS = ("-p", "no:cacheprovider", "-p", "no:benchmark")
LOAD_BYTES = 4_000_000_000
# Assumed acceptance of the first and second draft of an MTP block, and assumed tokens of a step with DSpark.
ACCEPTANCE, PER_STEP = (0.79, 0.58), 4.42
# Seconds of the part "mesh", so that it ends within ten minutes with its tests, and of one of its processes.
MESH_SECONDS, MESH_LIMIT = 480, 300
TESTS = ("-m", "pytest", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib", *PLUGINS, "-v", "-rs")


def progress() -> Callable[[str], None]:
    """A function that prints a message on stderr, with the seconds since this call."""
    start = time.monotonic()
    return lambda message: print(f"{time.monotonic() - start:6.1f} s  {message}", file=sys.stderr, flush=True)


def gpus() -> tuple[str, int]:
    """JAX's name of the GPU, and how many there are. A separate process asks for it, so that the GPUs' memory stays free.

    Raises:
        InputError: JAX finds no GPU, or does not start.
    """
    found = environment.probe()
    if found["backend"] != "gpu":
        raise environment.no_gpu(found["backend"])
    return found["device"], found["count"]


def gpu_tests(path: Path, tests: Sequence[str]) -> bool:
    """Run the tests marked gpu in a fresh process, and write its output to `path`. True if some passed and none failed."""
    # If the GPU does not start, the tests must fail. With a fallback to the CPU they would be skipped.
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
    """Whether pytest's last line counts at least one passed test."""
    lines = text.strip().splitlines()
    return bool(lines and re.search(r"\b[1-9]\d* passed", lines[-1]))


def _start_gpu() -> None:
    """Prepare this process for a part that uses the GPU."""
    from ds4jax import runtime

    runtime.configure()
    environment.require_gpu()


def _draw(plot: Callable[[Path, Any], None], path: Path, content: dict[str, Any], note: Callable[[str], None]) -> None:
    """Draw a result, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        note("no figure: matplotlib is not installed")
    else:
        plot(path, content)


def kernels_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure times and bits of the kernels on all products of V4-Flash. Writes `<slug>-kernels.json`, prints a table."""
    _start_gpu()
    from ds4jax.bench import bits, experts, report
    from ds4jax.bench.kernels import ROWS, Bench
    from pallas_kernels.tuning.shapes import FLASH

    bandwidth = environment.copy_gbps()
    note(f"copy {bandwidth:.0f} GB/s")
    found = Bench(FLASH, ROWS, bandwidth, check_bits=True).run(note)
    rows, problems = experts.measure(bandwidth, note)
    problems = found.problems + problems
    content = report.document(environment.describe(), bandwidth, found.rows + rows, found.bits, problems)
    report.write(out / f"{slug}-kernels.json", content)
    report.show(content)
    return bits.equal(found.bits) and not problems


def decode_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure the decode step of V4-Flash. Writes `<slug>-decode.json`, `.png` and `-decode-profile.txt`, prints tables."""
    _start_gpu()
    from ds4jax.bench import decode, decode_report, report

    content = decode.bench(decode.Options(strict=True, acceptance=ACCEPTANCE), note)
    report.write(out / f"{slug}-decode.json", content)
    decode_report.write_profile(out / f"{slug}-decode-profile.txt", content)
    _draw(decode_report.plot, out / f"{slug}-decode.png", content, note)
    decode_report.show(content)
    return decode.good(content)


def batch_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure decode steps of 1 to 32 sequences of V4-Flash. Writes `<slug>-batch.json` and `.png`, prints tables."""
    _start_gpu()
    from ds4jax.bench import batch, report

    content = batch.bench(batch.Options(), note)
    report.write(out / f"{slug}-batch.json", content)
    _draw(batch.plot, out / f"{slug}-batch.png", content, note)
    batch.show(content)
    return batch.good(content)


def load_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure the load rate of a 4 GB file against `cat` and a page-locked copy. Writes `<slug>-load.json` and prints it."""
    _start_gpu()
    from ds4jax.bench import load, report

    content = {**environment.describe(), **load.measure(LOAD_BYTES, note)}
    report.write(out / f"{slug}-load.json", content)
    load.show(content)
    return load.enough(content)


def prefill_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure prompts of 16 to 32,768 tokens with V4-Flash. Writes `<slug>-prefill.json` and a picture, and prints tables."""
    _start_gpu()
    from ds4jax.bench import prefill, prefill_report, report

    content = prefill.bench(prefill.Options(), note)
    report.write(out / f"{slug}-prefill.json", content)
    _draw(prefill_report.plot, out / f"{slug}-prefill.png", content, note)
    prefill_report.show(content)
    return prefill.good(content)


def long_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure plain decode of V4-Flash at 2 thousand to a million rows, with both caches. Writes `<slug>-long.json`."""
    _start_gpu()
    from ds4jax.bench import long, report
    from ds4jax.config import CACHES

    content = long.bench(long.Options(caches=CACHES), note)
    report.write(out / f"{slug}-long.json", content)
    long.show(content)
    return long.good(content)


def start_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure the time to the first token of V4-Flash, cold and warm. Writes `<slug>-start.json` and prints it.

    False if the processes differ in a bit.
    """
    from ds4jax.bench import report, start

    measured = start.measure(start.Options("flash-q2"), note)
    content = {**environment.describe(), **measured}
    report.write(out / f"{slug}-start.json", content)
    start.show(content)
    return start.same_bits(content)


def mesh_part(out: Path, slug: str, note: Callable[[str], None]) -> bool:
    """Measure V4-Flash on all GPUs and on fewer. Writes `<slug>-mesh.json` after each piece, `.png` and `-mesh-profile.txt`.

    What is in the file already, of the same source, device and options, is not measured again.
    """
    from ds4jax.bench import mesh, mesh_report, report
    from ds4jax.bench.mesh_options import Options

    path = out / f"{slug}-mesh.json"
    options = Options(exchanges=(), acceptance=ACCEPTANCE, per_step=PER_STEP, limit_seconds=MESH_LIMIT, all_seconds=MESH_SECONDS)
    content = mesh.bench(options, note, lambda content: report.write(path, content), before=mesh.earlier(path))
    mesh_report.write_profile(out / f"{slug}-mesh-profile.txt", content)
    _draw(mesh_report.plot, out / f"{slug}-mesh.png", content, note)
    mesh_report.show(content)
    return mesh.good(content)


PREFILL = (
    "tests/kernels/test_attention_prefill.py",
    "tests/kernels/test_grouped_matmul.py",
    "tests/kernels/test_hyper_connections_prefill.py",
    "tests/kernels/test_dispatch.py",
    "tests/model/test_prefill_kernels.py",
)
BATCH = ("tests/model/test_many_rows.py", "tests/decode/test_sequences_gpu.py")
LONG = ("tests/kernels/test_indexer.py", "tests/kernels/test_stored_rows.py")
# Tests of kernels that other parts run.
ELSEWHERE = ("tests/kernels/test_gpu.py", *PREFILL, *LONG)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the suite.

    Attributes:
        measure: takes the folder, the device's name for files and a function that prints notes; returns whether all is good.
        tests: arguments for pytest. Tests that mostly compile share the GPU in several processes.
        several: whether it measures all GPUs; the names of its files then have their number.
    """

    measure: Callable[[Path, str, Callable[[str], None]], bool] | None
    tests: tuple[str, ...]
    several: bool = False


PARTS = {
    "kernels": Part(kernels_part, ("-n", "4", "tests/kernels/test_gpu.py")),
    "decode": Part(decode_part, ("-n", "4", "tests/kernels", *(f"--deselect={file}" for file in ELSEWHERE))),
    "batch": Part(batch_part, ("-n", "2", *BATCH)),
    "load": Part(load_part, ("-n", "0", "tests/loading/test_memory.py")),
    "prefill": Part(prefill_part, ("-n", "4", *PREFILL)),
    "long": Part(long_part, ("-n", "4", *LONG)),
    "start": Part(start_part, ("-n", "0", "tests/engine/test_kept_gpu.py")),
    "mesh": Part(mesh_part, ("-n", "0", "tests/engine/test_mesh_gpu.py"), several=True),
    "lossless": Part(
        None,
        ("-n", "5", "tests/decode", "tests/model/test_decode_kernels.py", "tests/test_tiny_model.py"),
    ),
}


def suite(part: str, out: Path) -> int:
    """Run a part's measurements, then its tests. Returns the exit code.

    Raises:
        InputError: there is no GPU.
    """
    note = progress()
    chosen, (kind, count) = PARTS[part], gpus()
    slug = environment.slug(kind) + (f"-x{count}" if chosen.several else "")
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
