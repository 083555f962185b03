"""`ds4jax convert`: write a checkpoint directory or a GGUF file as a GGUF file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ds4jax.bounds import DENSE_FORMS, FLAVOURS, REQUANTISED_FORMS
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError

DESCRIPTION = """\
Write a model's files as GGUF. Tensors are read, converted and written one after another.

From a checkpoint directory (config.json and safetensors): FP4 experts become MXFP4 without loss, FP8 matrices the type of --dense
(Q8_0 rounds them, bf16 and f32 do not), other matrices stay bfloat16 or float32. In the flavour mainline, which llama.cpp loads,
an MTP block goes to mtp-OUT.gguf and a DSpark drafter to dspark-OUT.gguf, where ds4jax and llama.cpp find them. In the flavour
antirez, which the ds4 project's engine reads, --dense is the type of all dense matrices, and the MTP block is inside OUT.gguf.

From a GGUF file: the shards of a split file become one file, and --flavour changes names and keys. Every stored value is copied.
A type that the other flavour does not have, such as Q8_0 of an indexer in antirez, needs --requantise f32, which is exact.
With --flavour hub OUT is a checkpoint directory: MXFP4 experts become FP4, other quantised matrices float32, which holds their
values. --requantise gives all matrices but experts, routers and hyper-connections another type; q8_0, bf16 and f16 round.
Of two MTP files beside a model --drafter-file names one. The metadata of a GGUF file says what was done
(ds4jax.merged_shards, ds4jax.converted_flavour, ds4jax.requantised).

All files appear when all are complete. Until then the data is in OUT.gguf.partial, which no program takes for a model. After
Ctrl-C, a full disk or a crash, the same command checks that file and continues; the result is the same to the byte. --force also
removes mtp-OUT.gguf or dspark-OUT.gguf of an earlier model, which would be taken for the new one's. MODEL stays as it is."""

EXAMPLES = """\
examples:
  ds4jax convert DeepSeek-V4-Flash/ flash.gguf
  ds4jax convert DeepSeek-V4-Flash/ flash.gguf --dense bf16
  ds4jax convert DeepSeek-V4-Flash/ flash.gguf --flavour antirez
  ds4jax convert model-00001-of-00004.gguf model.gguf
  ds4jax convert model.gguf q8.gguf --requantise q8_0
  ds4jax convert model.gguf model/ --flavour hub"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint directory or a GGUF file as a GGUF file",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "source", type=cli_options.model_path, metavar="MODEL", help="a checkpoint directory, a GGUF file, or a shard of one"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the GGUF file to write, or the folder for --flavour hub")
    parser.add_argument(
        "--flavour",
        choices=FLAVOURS,
        help="GGUF as llama.cpp or as ds4 has it, or a checkpoint directory (mainline, or the GGUF file's own)",
    )
    models.add_drafter_file(parser)
    parser.add_argument("--dense", choices=tuple(DENSE_FORMS), help="of a checkpoint directory: type of dense matrices (q8_0)")
    parser.add_argument(
        "--requantise", choices=tuple(REQUANTISED_FORMS), metavar="TYPE",
        help=f"of a GGUF file: new type of dense matrices, {', '.join(REQUANTISED_FORMS)} (they are copied)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="replace OUT.gguf, and start again if OUT.gguf.partial is not of this conversion"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        KeyboardInterrupt: Ctrl-C, after a line that says how to go on.
        InputError: the files cannot be converted, or the file cannot be written.
    """
    if options.flavour != "hub":
        try:
            cli_options.output_file(str(options.out))
        except argparse.ArgumentTypeError as error:
            raise InputError(str(error)) from error
    try:
        from ds4jax.loading.convert import convert

        with progress.stages_bar("reading headers") as bar:
            layout = convert(
                options.source,
                options.out,
                flavour=options.flavour,
                dense=options.dense,
                requantise=options.requantise,
                drafter=options.drafter_file,
                force=options.force,
                progress=bar,
            )
    except KeyboardInterrupt:
        print(f"ds4jax: {options.out}: interrupted; the same command goes on from here", file=sys.stderr)
        raise
    if layout.note:
        print(f"ds4jax: {options.source}: {layout.note}", file=sys.stderr)
    for one in layout.outputs:
        print(f"{one.path}: {len(one.sources)} tensors, {one.nbytes / 1e6:,.1f} MB", file=sys.stderr)
    return 0
