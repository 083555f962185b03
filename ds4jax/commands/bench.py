"""`ds4jax bench`: time the kernels on this machine's GPU, or drafting and loading on whatever it has."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds4jax import cli_options
from ds4jax.commands import model as models
from ds4jax.config import CACHES
from ds4jax.errors import InputError

# Mirrors what a decode step may ask for; more rows take another path.
MOST_ROWS = 32
# Mirrors the names in `ds4jax.bench.synthetic`; importing it would import JAX.
LAYOUTS = ("flash-q2", "small-q2")
DEFAULT_ROWS = "1,2,3,4,8,12"

# Bytes of the file that loading is timed on: many tensors, and no more memory than any GPU has.
LOAD_BYTES = 4e9

DESCRIPTION = "Time the kernels on an NVIDIA GPU, or decoding or loading on any device."

EXAMPLES = """\
examples:
  ds4jax bench kernels
  ds4jax bench decode --synthetic flash-q2
  ds4jax bench knight --model model.gguf
  ds4jax bench load --bytes 1e9"""

KERNELS = """\
Time the Q8_0 kernel on every weight shape of DeepSeek-V4-Flash, beside jnp.dot on weights expanded to bf16 and f16.

Times are the profiler's, the weights of a shape take turns so that none is in the cache, and each figure stands beside its
fraction of the bandwidth that a copy reaches in the same run. It takes a few minutes and needs an NVIDIA GPU."""

KERNELS_EXAMPLES = """\
examples:
  ds4jax bench kernels
  ds4jax bench kernels --rows 1,4 --json kernels.json --plot kernels.png"""

KNIGHT = """\
Continue the prompt "knight" with the MTP block drafting 2 tokens a step, the same in strict mode, and without drafts; print the
speed of each and whether drafting says what plain decode says in the same mode, in every token and every bit of its logits. Exit
code 1 when it does not. Compilation is not in the figures."""

KNIGHT_EXAMPLES = """\
examples:
  ds4jax bench knight
  ds4jax bench knight --model model.gguf --max-new-tokens 512 --json"""

DECODE = """\
Decode with a model of random weights in the layout of the published 2-bit file, made in device memory in seconds, with caches as
full as --context says. Print the time of a step without drafts and at each depth, what it reads, how near that is to the
bandwidth of a copy in the same run, the kernels by the profiler, and whether drafting gives the tokens and the bits of plain
decode. Speed does not depend on the values. On a CPU there are no kernel times. Exit code 1 when something could not be measured
or differs. Several contexts, and a narrow cache, are compared by plain steps alone.

flash-q2 is DeepSeek-V4-Flash: 94 GB of weights, of which --layers takes the first few. small-q2 is a toy for any machine."""

DECODE_EXAMPLES = """\
examples:
  ds4jax bench decode --synthetic flash-q2 --json decode.json --plot decode.png
  ds4jax bench decode --synthetic flash-q2 --layers 8 --draft 0 --strict
  ds4jax bench decode --synthetic flash-q2 --acceptance 0.79,0.58
  ds4jax bench decode --synthetic flash-q2 --context 2048,32768,131072,1000000"""

PREFILL = """\
Take prompts of random tokens into the cache of a model of random weights, as `bench decode` makes it, a chunk at a time. Print
tokens a second, what a call takes at the beginning and at the end of the prompt, and what it needs beside weights and cache.
Compilation is not in the figures. Exit code 1 when something could not be measured."""

PREFILL_EXAMPLES = """\
examples:
  ds4jax bench prefill --synthetic flash-q2
  ds4jax bench prefill --synthetic flash-q2 --layers 6 --tokens 4096 --json prefill.json"""

LOAD = """\
Write a GGUF file in the layout of the published q2 file with random blocks, and time in turns, each three times: reading it with
`cat`, putting as many bytes onto the device from page-locked memory (on a CPU, copying them), and loading it. The file is in the
page cache from being written, so that no disk is timed; it lies in the folder for temporary files (TMPDIR) and is removed at the
end. Compilation is not in the figures."""

LOAD_EXAMPLES = """\
examples:
  ds4jax bench load
  ds4jax bench load --bytes 4e8 --json load.json"""

START = """\
Start a process three times, the first with nothing compiled, and print when its first token came, in parts: import, load (here,
making random weights on the device), compile (tracing, and reading what an earlier process compiled), prefill, decode."""

START_EXAMPLES = """\
examples:
  ds4jax bench start --synthetic flash-q2
  ds4jax bench start --synthetic small-q2 --prompt 32 --json start.json"""

file_size = cli_options.number(lambda value: 1 <= value <= 1e12, "it must be 1 to 1e12 bytes")


def row_counts(word: str) -> tuple[int, ...]:
    """A comma-separated list of row counts, each once, in order."""
    read = cli_options.integer(1, MOST_ROWS, f"a launch takes 1 to {MOST_ROWS} rows")
    return tuple(sorted({read(part) for part in word.split(",")}))


def depths(word: str) -> tuple[int, ...]:
    """A comma-separated list of drafts a step, each once, in order."""
    return tuple(sorted({cli_options.draft_count(part) for part in word.split(",")}))


def lengths(word: str) -> tuple[int, ...]:
    """A comma-separated list of token counts, each once, in order."""
    return tuple(sorted({cli_options.token_count(part) for part in word.split(",")}))


def shares(word: str) -> tuple[float, ...]:
    """A comma-separated list of shares, one for each draft after the other."""
    read = cli_options.number(lambda value: 0 <= value <= 1, "a share of drafts is 0 to 1")
    return tuple(read(part) for part in word.split(","))


def plot_file(word: str) -> Path:
    """A PNG file that can be written."""
    if not word.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{word}: the picture is a PNG; end the name with .png")
    return cli_options.output_file(word)


def add_parser(commands: Any) -> None:
    """Declare the sub-command and what it can time."""
    parser = commands.add_parser("bench", help="time the kernels, drafting or loading", description=DESCRIPTION, epilog=EXAMPLES)
    targets = parser.add_subparsers(title="what to time", dest="target", metavar="WHAT", required=True)
    kernels = targets.add_parser("kernels", help="the Q8_0 matmul", description=KERNELS, epilog=KERNELS_EXAMPLES)
    kernels.add_argument("--shapes", choices=("flash",), default="flash", help="whose weight shapes (flash)")
    kernels.add_argument(
        "--rows", type=row_counts, default=DEFAULT_ROWS, metavar="M,...", help=f"rows of activations ({DEFAULT_ROWS})"
    )
    kernels.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write every sample to this file")
    kernels.add_argument("--plot", type=plot_file, metavar="FILE.png", help="draw a roofline picture; needs matplotlib")
    kernels.set_defaults(run=run_kernels)
    _add_decode(targets)
    _add_prefill(targets)
    start = targets.add_parser("start", help="a process's first token", description=START, epilog=START_EXAMPLES)
    start.add_argument("--synthetic", choices=LAYOUTS, required=True, help="which model's shapes to make")
    start.add_argument("--layers", type=cli_options.token_count, metavar="N", help="the first N layers alone: a slice")
    start.add_argument("--prompt", type=cli_options.token_count, default=512, metavar="N", help="tokens of the prompt (512)")
    start.add_argument("--max-draft", type=cli_options.draft_count, default=0, metavar="D", help="deepest draft of the loop (0)")
    start.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write everything to this file")
    start.set_defaults(run=run_start)
    knight = targets.add_parser(
        "knight", help="drafting, strict and plain, on one prompt", description=KNIGHT, epilog=KNIGHT_EXAMPLES
    )
    models.add_options(knight)
    knight.add_argument(
        "--max-new-tokens", type=cli_options.token_count, default=256, metavar="N", help="tokens to add, whatever they are (256)"
    )
    knight.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    knight.set_defaults(run=run_knight)
    load = targets.add_parser("load", help="loading a file", description=LOAD, epilog=LOAD_EXAMPLES)
    load.add_argument(
        "--bytes", type=file_size, default=LOAD_BYTES, metavar="N", help="about how large the file is to be (4e9), at least 29 MB"
    )
    load.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write every sample to this file")
    load.set_defaults(run=run_load)


def _add_decode(targets: Any) -> None:
    parser = targets.add_parser("decode", help="the decode step at full shape", description=DECODE, epilog=DECODE_EXAMPLES)
    parser.add_argument("--synthetic", choices=LAYOUTS, required=True, help="which model's shapes to make")
    parser.add_argument("--layers", type=cli_options.token_count, metavar="N", help="the first N layers alone: a slice")
    parser.add_argument(
        "--context",
        type=lengths,
        default="2048",
        metavar="N,...",
        help="rows in the caches before the first step (2048)",
    )
    parser.add_argument("--cache", choices=CACHES, default="float32", help="how compressed rows are stored (float32)")
    parser.add_argument("--draft", type=depths, default="0,1,2", metavar="D,...", help="drafts a step, 0 to 4 (0,1,2)")
    parser.add_argument("--strict", action="store_true", help="time strict plain decode too")
    parser.add_argument("--steps", type=cli_options.token_count, default=64, metavar="N", help="tokens of each run (64)")
    parser.add_argument(
        "--acceptance",
        type=shares,
        default=(),
        metavar="P,...",
        help="add tokens/s if these shares of first, second, .. drafts stood; labelled simulated",
    )
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write everything to this file")
    parser.add_argument("--plot", type=plot_file, metavar="FILE.png", help="draw the longest kernels; needs matplotlib")
    parser.set_defaults(run=run_decode)


def _add_prefill(targets: Any) -> None:
    parser = targets.add_parser("prefill", help="prompts at full shape", description=PREFILL, epilog=PREFILL_EXAMPLES)
    parser.add_argument("--synthetic", choices=LAYOUTS, required=True, help="which model's shapes to make")
    parser.add_argument("--layers", type=cli_options.token_count, metavar="N", help="the first N layers alone: a slice")
    parser.add_argument(
        "--tokens", type=lengths, default="4096,32768", metavar="N,...", help="lengths of the prompts (4096,32768)"
    )
    parser.add_argument("--chunk", type=cli_options.token_count, default=4096, metavar="N", help="rows of a call (4096)")
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write everything to this file")
    parser.set_defaults(run=run_prefill)


def _require_matplotlib(options: argparse.Namespace) -> None:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")


def _notes() -> Callable[[str], None]:
    """A function that tells a terminal what comes next, with the seconds since now."""
    start = time.monotonic()

    def note(message: str) -> None:
        if sys.stderr and sys.stderr.isatty():
            print(f"{time.monotonic() - start:6.1f} s  {message}", file=sys.stderr)

    return note


def run_kernels(options: argparse.Namespace) -> int:
    """Carry `bench kernels` out; returns 0, or 1 when something could not be measured.

    Raises:
        InputError: there is no GPU, or no matplotlib for the picture.
    """
    _require_matplotlib(options)
    from ds4jax import runtime
    from ds4jax.bench import environment

    environment.require_gpu()
    runtime.configure()
    from ds4jax.bench import report
    from ds4jax.bench.kernels import Bench
    from pallas_kernels.shapes import FLASH

    bandwidth = environment.copy_gbps()
    found = Bench(FLASH, options.rows, bandwidth, check_bits=False).run(_notes())
    content = report.document(environment.describe(), bandwidth, found.rows, found.bits, found.problems)
    report.show(content)
    if options.json:
        report.write(options.json, content)
    if options.plot:
        report.plot(options.plot, content)
    return 1 if found.problems else 0


def run_decode(options: argparse.Namespace) -> int:
    """Carry `bench decode` out; returns 0, or 1 when something could not be measured or drafting changes what is said.

    Raises:
        InputError: a slice, a context or a list of shares that does not fit, or no matplotlib for the picture.
    """
    _require_matplotlib(options)
    from ds4jax import runtime

    runtime.configure()
    if len(options.context) > 1 or options.cache != "float32":
        return _run_long(options)
    from ds4jax.bench import decode, decode_report, report

    chosen = decode.Options(
        layout=options.synthetic,
        layers=options.layers,
        context=options.context[0],
        drafts=options.draft,
        strict=options.strict,
        steps=options.steps,
        acceptance=options.acceptance,
    )
    content = decode.bench(chosen, _notes())
    if options.json:
        report.write(options.json, content)
    if options.plot:
        decode_report.plot(options.plot, content)
    decode_report.show(content)
    return 0 if decode.good(content) else 1


def _run_long(options: argparse.Namespace) -> int:
    """Carry `bench decode` out for several contexts."""
    if options.plot or options.strict or options.acceptance:
        raise InputError("several contexts, or a narrow cache: plain steps alone; leave --plot, --strict and --acceptance out")
    from ds4jax.bench import long, report

    chosen = long.Options(options.synthetic, options.layers, (options.cache,), options.context, options.steps)
    content = long.bench(chosen, _notes())
    if options.json:
        report.write(options.json, content)
    long.show(content)
    return 0 if long.good(content) else 1


def run_prefill(options: argparse.Namespace) -> int:
    """Carry `bench prefill` out; returns 0, or 1 when something could not be measured.

    Raises:
        InputError: a slice, a prompt or a chunk that does not fit.
    """
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import prefill, report

    chosen = prefill.Options(options.synthetic, options.layers, options.tokens, options.chunk)
    content = prefill.bench(chosen, _notes())
    if options.json:
        report.write(options.json, content)
    prefill.show(content)
    return 0 if prefill.good(content) else 1


def run_knight(options: argparse.Namespace) -> int:
    """Carry `bench knight` out; returns 0, or 1 when drafting changes what is said.

    Raises:
        InputError: the model cannot be used, or has no MTP block or no tokenizer.
    """
    model = models.open_model(options)
    from ds4jax.bench import environment
    from ds4jax.bench import knight as bench

    where = environment.describe()
    rows = bench.knight(model, options.max_new_tokens, _notes())
    if options.json:
        print(json.dumps(bench.document(where, model, rows), ensure_ascii=False))
    else:
        bench.show(where, rows)
    return 0 if bench.equal(rows) else 1


def run_start(options: argparse.Namespace) -> int:
    """Carry `bench start` out; returns 0.

    Raises:
        InputError: a process ended without a token.
    """
    from ds4jax.bench import environment, report
    from ds4jax.bench import start as bench

    # Asked for at the end: a process that has asked holds the device's memory.
    measured = bench.measure(bench.Options(options.synthetic, options.layers, options.prompt, options.max_draft), _notes())
    content = {**environment.describe(), **measured}
    bench.show(content)
    if options.json:
        report.write(options.json, content)
    return 0


def run_load(options: argparse.Namespace) -> int:
    """Carry `bench load` out; returns 0.

    Raises:
        InputError: no room for the file or on the device.
    """
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import environment, report
    from ds4jax.bench import load as bench

    content = {**environment.describe(), **bench.measure(int(options.bytes), _notes())}
    bench.show(content)
    if options.json:
        report.write(options.json, content)
    return 0
