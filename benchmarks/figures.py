"""Write the figures of the README and the documentation from the files in benchmarks/results.

usage: python benchmarks/figures.py           rewrite what stands between the markers of the documents
       python benchmarks/figures.py --ages    print how old each result is, in commits that changed pallas_kernels

A document says `<!-- figures: NAME -->`, and `<!-- end of figures -->` below; NAME is a key of `FIGURES`.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ds4jax.bench.environment import kernels_sha256
from ds4jax.bench.prefill_report import by_width

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/**/*.md")
MARKED = re.compile(r"(<!-- figures: ([\w ]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
PROGRAMS = {
    "plain": "plain, `max_draft` 0",
    "plain in max_draft 2": "plain in the program for two drafts",
    "draft 1 in max_draft 2": "one draft a step",
    "draft 2 in max_draft 2": "two drafts a step",
    "plain, sampled": "plain, sampled at temperature 1 with top-p 0.95",
    "draft 2 in max_draft 2, sampled": "two drafts a step, sampled the same",
    "plain, sampled, top-k 1": "plain, sampled with top-k 1: the greedy tokens",
    "draft 2 in max_draft 2, sampled, top-k 1": "two drafts a step, sampled with top-k 1",
}
SHAPES = {
    "q_b": "32768×1024",
    "o_a": "8×1024×4096",
    "o_b": "4096×8192",
    "gate + up": "2×2048×4096",
    "down": "4096×2048",
    "q_a + kv": "(1024+512)×4096",
    "head": "129280×4096",
}
CARDS = {"H100": "h100-80gb-hbm3", "H200": "h200"}
KERNEL_ROWS = (1, 2, 3, 4, 8)


def result(name: str) -> Any:
    """A result of an NVIDIA card by its name, such as h200-decode."""
    return json.loads((RESULTS / f"nvidia-{name}.json").read_text())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _others() -> Any:
    return json.loads((ROOT / "benchmarks" / "other_engines.json").read_text())


def speed() -> str:
    """One sequence on one card, beside other engines."""
    decode, dspark, batch = result("h200-decode"), result("h200-decode-0731"), result("h200-batch")
    two = decode["simulated"][-1]
    chats = next(row for row in dspark["simulated_per_step"] if row["tokens_per_step"] == 3.3)
    many = max((row for row in batch["rows"] if not row["sampled"]), key=lambda row: row["sequences"])
    prompt = next(row for row in result("h200-prefill")["rows"] if row["tokens"] == 4096)
    measured = _others()["measured"]
    reference, llama = measured["reference"], measured["llama_cpp"]
    acceptance = "/".join(map(str, two["acceptance"]))
    rows = [
        ("**ds4jax**, plain decode", f"**{decode['rows'][0]['tokens_per_second']:.0f}**", "measured"),
        (
            "**ds4jax**, two MTP drafts",
            f"**{two['tokens_per_second']:.0f}**",
            f"step measured, acceptance *simulated*: {acceptance}, as published for V4-Flash",
        ),
        (
            "**ds4jax**, five DSpark drafts",
            f"**{chats['tokens_per_second']:.0f}**",
            f"step measured, {chats['tokens_per_step']} tokens a step *simulated*: the published average of chats",
        ),
        (f"**ds4jax**, {many['sequences']} sequences in all", f"**{many['tokens_per_second']:.0f}**", "measured"),
        (
            f"{reference['engine']} ({reference['state']}), default; fastest flags",
            f"{reference['default']}; {reference['fastest']}",
            "measured once, same layout, random weights",
        ),
        (
            "the same with MTP",
            str(reference["mtp"]),
            f"measured once, {reference['mtp_tokens_per_step']} tokens a step *simulated*",
        ),
        *((f"{one['engine']}, {one['what']}", one["tokens_per_second"], f"[reported]({one['source']})") for one in _reported()),
        (
            f"llama.cpp ({llama['state']}), {llama['what']} alone",
            str(llama["plain"]),
            f"measured once; ds4jax {llama['ds4jax']:,} with the same layers",
        ),
        (
            f"prompt of {prompt['tokens']:,} tokens: ds4jax; {reference['engine']}",
            f"**{prompt['tokens_per_second']:,.0f}**; {reference['prompt']:,}",
            "measured",
        ),
    ]
    return _table(("on one NVIDIA H200", "tokens/s", "how it is known"), rows)


def _reported() -> list[dict[str, str]]:
    """What others report of one H200."""
    return [one for one in _others()["reported"] if one["what"].startswith("one H200")]


def decode() -> str:
    """Programs of the whole model."""
    content = result("h200-decode")
    simulated = {row["name"]: row for row in content["simulated"]}
    rows = []
    for row in content["rows"]:
        speed = f"{row['tokens_per_second']:.1f}" if row["tokens_per_second"] else ""
        if guess := simulated.get(row["name"]):
            speed = f"{guess['tokens_per_second']:.0f} at a *simulated* acceptance of {'/'.join(map(str, guess['acceptance']))}"
        cells = f"{row['ms_per_step']:.2f}", speed, f"{row['bytes'] / 1e9:.2f}", f"{row['fraction']:.2f}"
        rows.append((PROGRAMS[row["name"]], *cells))
    plain, calls = content["profiles"][0], content["calls"]
    kernels = f"{plain['kernels']:.0f} kernels, {plain['kernels_per_layer']} a layer, and {plain['kernel_ms']:.2f} ms in them"
    no_weights, copy = f"{100 * plain['no_weights']:.0f} %", f"{content['copy_gbps']:,.0f} GB/s"
    pieces, one_call = (f"{calls[name]:.1f} tokens/s" for name in ("in_pieces", "in_one_call"))
    return f"""\
{_table(("", "ms a step", "tokens/s", "GB a step", "of the copy bandwidth"), rows)}

The plain step is {kernels}; those that read no weights take {no_weights} of it.
The copy bandwidth of the run is {copy}. Memory at its peak is {content["peak_bytes"] / 1e9:.1f} GB.
Through `stream`, in pieces of 8 tokens, plain decode runs at {pieces}, and at {one_call} in one call of `generate`."""


def dspark() -> str:
    """The step with five drafts."""
    content = result("h200-decode-0731")
    assert content["drafter"] == "dspark"
    assert content["lossless"]["equal"]
    rows = [(str(row["tokens_per_step"]), f"{row['tokens_per_second']:.0f}") for row in content["simulated_per_step"]]
    return f"""\
A step with five drafts takes {content["rows"][-1]["ms_per_step"]:.2f} ms, its five drafts included.

{_table(("tokens a step, *simulated*", "tokens/s"), rows)}"""


def batch() -> str:
    """Several sequences at once."""
    content = result("h200-batch")
    assert all(row["equal"] for row in content["bits"])
    rows = [
        (str(row["sequences"]), f"{row['ms_per_step']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['bytes'] / 1e9:.2f}")
        for row in content["rows"]
        if row["context"] == 2048 and not row["sampled"]
    ]
    return _table(("sequences", "ms a step", "tokens/s in all", "GB a step"), rows)


def another_layout() -> str:
    """The layout of unsloth's UD-IQ3_XXS."""
    content = result("h200-decode-ud-iq3-xxs")
    [row] = content["rows"]
    return (
        f"In the layout of unsloth's UD-IQ3_XXS ({content['weight_bytes'] / 1e9:.1f} GB on the device) a plain step takes "
        f"{row['ms_per_step']:.2f} ms: {row['tokens_per_second']:.1f} tokens/s."
    )


def prompts() -> str:
    """Prompts at full shape: the time to the first token."""
    content, rows = result("h200-prefill"), []
    for row in content["rows"]:
        cold, warm = (statistics.median(row[name]) for name in ("cold_ms", "warm_ms"))
        times = f"{cold:,.0f}", f"{warm:,.0f}" if row["reused"] else "", f"{row['floor_ms']:,.0f}"
        rows.append((f"{row['tokens']:,}", by_width(row["calls"]), *times, f"{row['tokens_per_second']:,.0f}"))
    head = "tokens", "calls", "new prompt, ms", "known before, ms", "floor, ms", "tokens/s"
    memory = ", ".join(f"{int(width):,} rows {size / 1e9:.2f}" for width, size in content["temporary_bytes"].items())
    return f"{_table(head, rows)}\n\nTemporaries of a call in GB, in addition to weights and cache: {memory}."


def long_contexts() -> str:
    """Plain decode at long contexts."""
    content = result("h200-long")
    rows = []
    for row in content["rows"]:
        figures = f"{row['ms_per_step']:.2f}", f"{row['tokens_per_second']:.1f}", f"{row['relative']:.2f}"
        rows.append((f"{row['context']:,}", row["cache"], *figures, f"{row['cache_bytes'] / 1e9:.2f}"))
    peak = max(row["peak_bytes"] for row in content["rows"])
    return f"""\
{_table(("context", "cache", "ms a step", "tokens/s", "of the first", "cache, GB"), rows)}

Weights take {content["weight_bytes"] / 1e9:.1f} GB; the run's peak is {peak / 1e9:.1f} GB."""


def ratios() -> str:
    """Steps with drafts beside the plain step."""
    two, five = result("h200-decode")["rows"], result("h200-decode-0731")["rows"]
    mtp, dspark = (rows[-1]["ms_per_step"] / two[0]["ms_per_step"] for rows in (two, five))
    return (
        f"On an H200 the step with two MTP drafts takes {mtp:.1f} times as long as the plain one, and the step with five DSpark "
        f"drafts {dspark:.1f} times."
    )


def slots() -> str:
    """What eight slots take beside the weights."""
    content = result("h200-long")
    sizes = {row["context"]: 8 * row["cache_bytes"] / 1e9 for row in content["rows"] if row["cache"] == "narrow"}
    return (
        f"Weights take {content['weight_bytes'] / 1e9:.1f} GB. Eight slots of 131,072 tokens take {sizes[131072]:.0f} GB as "
        f"`narrow`, and eight of a million {sizes[1000000]:.0f} GB."
    )


def start_and_load() -> str:
    """The first token of a process, and the load rate."""
    runs, load = result("h200-start")["runs"], result("h200-load")
    cold, warm, again = (f"{runs[name]['without_load']:.1f} s" for name in ("cold", "warm", "warm again"))
    size, rate = f"{load['bytes'] / 1e9:.1f} GB", f"{load['gbps']['load']:.1f} GB/s"
    return f"""\
A process has its first token {cold} after it began when it has to compile everything, and {warm} after it when all is kept
from an earlier one ({again} in a third), without the time to make the weights. Loading a file of {size} from the page
cache onto the H200 runs at {rate}, {load["ratio"]:.2f} of what `cat` reads in the same run."""


def _us(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def kernels() -> str:
    """Q8_0 products: µs and fraction of the copy bandwidth."""
    contents = {card: result(f"{name}-kernels") for card, name in CARDS.items()}
    found = {(card, row["name"], row["kind"], row["m"]): row for card in contents for row in contents[card]["rows"]}
    rows = []
    for product, shape in SHAPES.items():
        for card in CARDS:
            ours = [found[card, product, "share_warp", m] for m in KERNEL_ROWS]
            dot = found.get((card, product, "dot_bf16", 4))
            times = (f"{_us(row['us'])}, {row['fraction']:.2f}" for row in ours)
            rows.append((f"{product} {shape}", card, *times, _us(dot["us"]) if dot else ""))
    bandwidths = " and ".join(f"{content['copy_gbps']:,.0f} GB/s on the {card}" for card, content in contents.items())
    head = "product", "device", *(f"M={m}" for m in KERNEL_ROWS), "`jnp.dot` bf16, M=4"
    above = "A read alone is faster than the copy, hence the fractions above 1."
    return f"{_table(head, rows)}\n\nThe copy bandwidth is {bandwidths}. {above}"


FIGURES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "decode": decode,
    "dspark": dspark,
    "batch": batch,
    "another layout": another_layout,
    "prompts": prompts,
    "long contexts": long_contexts,
    "ratios": ratios,
    "slots": slots,
    "start and load": start_and_load,
    "kernels": kernels,
}


def filled(text: str) -> str:
    """A document with the figures of today's results between its markers.

    Raises:
        KeyError: a marker names no figures.
    """
    return MARKED.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}\n{found[4]}", text)


def documents() -> list[Path]:
    """The documents that may hold figures."""
    return sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


def age(commit: str) -> str:
    """How many commits changed pallas_kernels since a commit, in words."""
    command = ["git", "rev-list", "--count", f"{commit.removesuffix('-dirty')}..HEAD", "--", "pallas_kernels"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown: no git"
    if done.returncode == 0:
        return done.stdout.strip()
    return (
        "unknown: no history of git here"
        if "not a git repository" in done.stderr
        else "unknown: its commit is not in this history"
    )


def ages() -> dict[str, tuple[str, str]]:
    """The commit and the age of every result. One of today's kernels is of age 0, whatever its commit was."""
    now = kernels_sha256()
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        found[path.stem] = content["commit"], "0" if content["kernels_sha256"] == now else age(content["commit"])
    return found


def ages_table() -> str:
    """The ages as a Markdown table."""
    rows = [(f"`{name}.json`", commit.removesuffix("-dirty")[:7], old) for name, (commit, old) in ages().items()]
    return _table(("result", "measured at commit", "commits that changed pallas_kernels since"), rows)


def main() -> None:
    """Rewrite the documents, or print the ages."""
    if "--ages" in sys.argv[1:]:
        print(ages_table())
        return
    for path in documents():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
