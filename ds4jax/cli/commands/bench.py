"""`ds4jax bench`: time the kernels on a GPU, or decoding and loading on any device."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

from ds4jax.bounds import LAYOUT_NAMES, Integers, Numbers
from ds4jax.cli import options as cli_options
from ds4jax.cli.commands import bench_batch, bench_costs, bench_mesh, bench_prefill, bench_serve
from ds4jax.cli.commands import model as models
from ds4jax.cli.commands.bench_result import ended, notes
from ds4jax.config import CACHES
from ds4jax.errors import InputError

# Maximum rows of a launch to time; more rows take another path.
MAX_ROWS = 32
DEFAULT_ROWS = "1,2,3,4,8,16,32"

# Bytes of the file for timing the loader: many tensors, and it fits on any GPU.
LOAD_BYTES = 4e9

DESCRIPTION = "Time the kernels on an NVIDIA GPU, or decoding, loading or a server on any device."

EXAMPLES = """\
examples:
  ds4jax bench kernels
  ds4jax bench decode --synthetic flash-q2
  ds4jax bench reference --model model.gguf
  ds4jax bench load --bytes 1e9
  ds4jax bench serve --rate 4
  ds4jax bench suite --part kernels"""

KERNELS = """\
Time the Q8_0 kernel on all weight shapes of DeepSeek-V4-Flash, and jnp.dot on weights dequantised to bf16 and f16; and the expert
kernels with 6, 18 and 48 pairs of rows and experts (1, 3 and 8 rows) in the formats IQ2_XXS, Q2_K, IQ2_S, IQ3_XXS and MXFP4.

Times come from the profiler. Each call reads other weights, so that none are in the cache. Each figure also has its fraction of
the bandwidth of a copy in the same run. This takes a few minutes and needs an NVIDIA GPU."""

KERNELS_EXAMPLES = """\
examples:
  ds4jax bench kernels
  ds4jax bench kernels --experts
  ds4jax bench kernels --rows 1,4 --json kernels.json --plot kernels.png"""

REFERENCE = """\
Continue the prompt "knight" with 2 drafts per step and without drafts, in the default and in the strict mode. Print the speed of
each, and whether drafting gives the same tokens and the same bits of the logits as plain decode in the same mode. Exit code 1 if
it does not. The figures do not include compilation."""

REFERENCE_EXAMPLES = """\
examples:
  ds4jax bench reference
  ds4jax bench reference --model model.gguf --max-new-tokens 512 --json"""

DECODE = """\
Decode with a model of random weights in the layout of a published file. The weights are made in device memory in seconds,
and the caches hold --context rows. Print the time of a step without drafts and at each depth, the bytes that it reads, the
fraction of the bandwidth of a copy in the same run, the kernels by the profiler, and whether drafting gives the tokens and the
bits of plain decode. Speed does not depend on the values. A CPU has no kernel times. Exit code 1 if a measurement fails or a bit
differs. For several contexts or a narrow cache, only plain steps are timed.

flash-q2 is DeepSeek-V4-Flash in antirez's 2-bit layout, 94 GB of weights, and ud-iq3-xxs in the layout of unsloth's file of that
name, 109 GB, with the same MTP block; --layers takes the first layers only. small-q2 and small-ud-iq3-xxs are small enough for
any machine."""

DECODE_EXAMPLES = """\
examples:
  ds4jax bench decode --synthetic flash-q2 --json decode.json --plot decode.png
  ds4jax bench decode --synthetic flash-q2 --layers 8 --draft 0 --strict
  ds4jax bench decode --synthetic flash-q2 --acceptance 0.79,0.58
  ds4jax bench decode --synthetic flash-q2 --context 2048,32768,131072,1000000"""

LOAD = """\
Write a GGUF file with random blocks in the layout of the published q2 file. Then time three steps, alternating, three times each:
reading the file with `cat`, copying as many bytes to the device from page-locked memory (on a CPU, to other memory), and loading
the file. The file is in the page cache, so no disk is timed. It is in the folder for temporary files (TMPDIR) and is removed at
the end. The figures do not include compilation."""

LOAD_EXAMPLES = """\
examples:
  ds4jax bench load
  ds4jax bench load --bytes 4e8 --json load.json"""

START = """\
Start a process three times, the first time with an empty compilation cache, and print the time to its first token, in parts:
import, load (with --synthetic, making random weights on the device), compile (tracing, and compiling or reading programs from the
cache), prefill, decode. Also print the time of all CPU cores, and how many programs were traced and compiled."""

START_EXAMPLES = """\
examples:
  ds4jax bench start --prompt 8
  ds4jax bench start --synthetic flash-q2
  ds4jax bench start --synthetic small-q2 --prompt 32 --json start.json"""

# Parts of `ds4jax.bench.suite`, which imports JAX.
PARTS = ("kernels", "decode", "batch", "load", "prefill", "long", "start", "mesh", "lossless")

SUITE = """\
Run one part's benchmarks and bit comparisons, then its tests marked gpu, and write the results to the folder. Exit code 1 if a
test or a measurement fails or a bit differs. Needs a checkout, pytest and an NVIDIA GPU; the part mesh needs several, and goes on
where it was cut."""

SUITE_EXAMPLES = """\
examples:
  ds4jax bench suite --part decode
  ds4jax bench suite --part lossless --out results"""

file_size = cli_options.number(Numbers(1, 1e12, "it must be 1 to 1e12 bytes"))


def row_counts(word: str) -> tuple[int, ...]:
    """A comma-separated list of row counts, sorted without repeats."""
    read = cli_options.integer(Integers(1, MAX_ROWS, f"a launch takes 1 to {MAX_ROWS} rows"))
    return tuple(sorted({read(part) for part in word.split(",")}))


def add_parser(commands: Any) -> None:
    """Declare the sub-command and its benchmarks."""
    parser = commands.add_parser("bench", help="time the kernels, drafting or loading", description=DESCRIPTION, epilog=EXAMPLES)
    targets = parser.add_subparsers(title="what to time", dest="target", metavar="WHAT", required=True)
    kernels = targets.add_parser("kernels", help="the kernels of products", description=KERNELS, epilog=KERNELS_EXAMPLES)
    kernels.add_argument("--shapes", choices=("flash",), default="flash", help="the model of the weight shapes (flash)")
    kernels.add_argument(
        "--rows", type=row_counts, default=DEFAULT_ROWS, metavar="M,...", help=f"rows of activations ({DEFAULT_ROWS})"
    )
    kernels.add_argument("--experts", action="store_true", help="time the expert kernels alone")
    kernels.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write every sample to this file")
    kernels.add_argument("--plot", type=cli_options.plot_file, metavar="FILE.png", help="draw a roofline; needs matplotlib")
    kernels.set_defaults(run=run_kernels)
    _add_decode(targets)
    bench_batch.add_parser(targets)
    bench_costs.add_parser(targets)
    bench_serve.add_parser(targets)
    bench_prefill.add_parser(targets)
    bench_mesh.add_parser(targets)
    start = targets.add_parser("start", help="the first token of a process", description=START, epilog=START_EXAMPLES)
    start.add_argument("--synthetic", choices=LAYOUT_NAMES, help="a model of these shapes with random weights (the tiny model)")
    start.add_argument("--layers", type=cli_options.token_count, metavar="N", help="only the first N layers: a slice")
    start.add_argument("--prompt", type=cli_options.token_count, default=512, metavar="N", help="tokens of the prompt (512)")
    start.add_argument("--max-draft", type=cli_options.draft_count, default=0, metavar="D", help="maximum drafts of the loop (0)")
    start.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    start.set_defaults(run=run_start)
    reference = targets.add_parser(
        "reference", help="drafting, strict and plain, on one prompt", description=REFERENCE, epilog=REFERENCE_EXAMPLES
    )
    models.add_options(reference)
    reference.add_argument(
        "--max-new-tokens",
        type=cli_options.token_count,
        default=256,
        metavar="N",
        help="tokens to add, past any end token (256)",
    )
    reference.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    reference.set_defaults(run=run_reference)
    load = targets.add_parser("load", help="loading a file", description=LOAD, epilog=LOAD_EXAMPLES)
    load.add_argument(
        "--bytes", type=file_size, default=LOAD_BYTES, metavar="N", help="approximate size of the file, at least 29 MB (4e9)"
    )
    load.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write every sample to this file")
    load.set_defaults(run=run_load)
    suite = targets.add_parser("suite", help="one part's benchmarks and tests", description=SUITE, epilog=SUITE_EXAMPLES)
    suite.add_argument("--part", choices=PARTS, required=True, help="the part to run")
    suite.add_argument(
        "--out", type=cli_options.new_folder, default="runs/bench", metavar="DIR", help="folder for the results (runs/bench)"
    )
    suite.set_defaults(run=run_suite)


def _add_decode(targets: Any) -> None:
    parser = targets.add_parser("decode", help="the decode step at full shape", description=DECODE, epilog=DECODE_EXAMPLES)
    parser.add_argument("--synthetic", choices=LAYOUT_NAMES, required=True, help="the model of the shapes")
    parser.add_argument("--layers", type=cli_options.token_count, metavar="N", help="only the first N layers: a slice")
    parser.add_argument(
        "--context",
        type=cli_options.lengths,
        default="2048",
        metavar="N,...",
        help="rows in the caches before the first step (2048)",
    )
    parser.add_argument("--cache", choices=CACHES, default="float32", help="storage of compressed rows (float32)")
    parser.add_argument("--draft", type=cli_options.depths, default="0,1,2", metavar="D,...", help="drafts per step (0,1,2)")
    parser.add_argument("--strict", action="store_true", help="also time strict plain decode")
    parser.add_argument("--steps", type=cli_options.token_count, default=64, metavar="N", help="tokens of each run (64)")
    parser.add_argument(
        "--acceptance",
        type=cli_options.shares,
        default=(),
        metavar="P,...",
        help="add tokens/s under this assumed acceptance of the first, second, .. draft; labelled simulated",
    )
    parser.add_argument(
        "--per-step",
        type=cli_options.counts_per_step,
        default=(),
        metavar="N,...",
        help="add tokens/s of the maximum draft if a step commits N tokens; labelled simulated",
    )
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    parser.add_argument("--plot", type=cli_options.plot_file, metavar="FILE.png", help="draw the kernels; needs matplotlib")
    parser.set_defaults(run=run_decode)


def _require_matplotlib(options: argparse.Namespace) -> None:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")


def run_kernels(options: argparse.Namespace) -> int:
    """Run `bench kernels`. Returns 0, or 1 if a measurement failed.

    Raises:
        InputError: there is no GPU, matplotlib is missing for --plot, or --plot has nothing to draw.
    """
    _require_matplotlib(options)
    if options.plot and options.experts:
        raise InputError("--plot: it draws the Q8_0 kernel; leave --experts out")
    from ds4jax import runtime
    from ds4jax.bench import environment

    environment.require_gpu()
    runtime.configure()
    from ds4jax.bench import experts, report
    from ds4jax.bench.kernels import Bench
    from pallas_kernels.tuning.shapes import FLASH

    bandwidth, note = environment.copy_gbps(), notes()
    rows, problems = experts.measure(bandwidth, note)
    if not options.experts:
        found = Bench(FLASH, options.rows, bandwidth, check_bits=False).run(note)
        rows, problems = found.rows + rows, found.problems + problems
    content = report.document(environment.describe(), bandwidth, rows, [], problems)
    if options.plot:
        report.plot(options.plot, content)
    return ended(options, content, report.show, not problems)


def run_decode(options: argparse.Namespace) -> int:
    """Run `bench decode`. Returns 0, or 1 if a measurement failed or drafting changes the output.

    Raises:
        InputError: the layers, the context or the acceptance do not fit the model, or matplotlib is missing for --plot.
    """
    _require_matplotlib(options)
    from ds4jax import runtime

    runtime.configure()
    if len(options.context) > 1 or options.cache != "float32":
        return _run_long(options)
    from ds4jax.bench import decode, decode_report

    chosen = decode.Options(
        layout=options.synthetic,
        layers=options.layers,
        context=options.context[0],
        drafts=options.draft,
        strict=options.strict,
        steps=options.steps,
        acceptance=options.acceptance,
        per_step=options.per_step,
    )
    content = decode.bench(chosen, notes())
    if options.plot:
        decode_report.plot(options.plot, content)
    return ended(options, content, decode_report.show, decode.good(content))


def _run_long(options: argparse.Namespace) -> int:
    """Run `bench decode` for several contexts or a narrow cache."""
    if options.plot or options.strict or options.acceptance or options.per_step:
        raise InputError(
            "several contexts or a narrow cache: plain steps only; leave --plot, --strict, --acceptance and --per-step out"
        )
    from ds4jax.bench import long

    chosen = long.Options(options.synthetic, options.layers, (options.cache,), options.context, options.steps)
    content = long.bench(chosen, notes())
    return ended(options, content, long.show, long.good(content))


def run_reference(options: argparse.Namespace) -> int:
    """Run `bench reference`. Returns 0, or 1 if drafting changes the output.

    Raises:
        InputError: the model cannot be used, or has no MTP block or no tokenizer.
    """
    model = models.open_model(options)
    from ds4jax.bench import environment
    from ds4jax.bench import reference_table as bench

    where = environment.describe()
    rows = bench.measure(model, options.max_new_tokens, notes())
    if options.json:
        print(json.dumps(bench.document(where, model, rows), ensure_ascii=False))
    else:
        bench.show(where, rows)
    return 0 if bench.equal(rows) else 1


def run_start(options: argparse.Namespace) -> int:
    """Run `bench start`. Returns 0, or 1 if the processes differ in a bit.

    Raises:
        InputError: a process failed.
    """
    from ds4jax.bench import environment
    from ds4jax.bench import start as bench

    # The environment is described last: it starts JAX, and then this process holds the device's memory.
    measured = bench.measure(bench.Options(options.synthetic, options.layers, options.prompt, options.max_draft), notes())
    content = {**environment.describe(), **measured}
    return ended(options, content, bench.show, bench.same_bits(content))


def run_load(options: argparse.Namespace) -> int:
    """Run `bench load`. Returns 0.

    Raises:
        InputError: the file does not fit in the temporary folder, or the weights do not fit on the device.
    """
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import environment
    from ds4jax.bench import load as bench

    content = {**environment.describe(), **bench.measure(int(options.bytes), notes())}
    return ended(options, content, bench.show)


def run_suite(options: argparse.Namespace) -> int:
    """Run `bench suite`. Returns 0, or 1 if a test, a comparison or a measurement failed.

    Raises:
        InputError: there is no GPU.
    """
    from ds4jax.bench.suite import suite

    return suite(options.part, options.out.resolve())
