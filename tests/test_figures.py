"""The README's figures of the H200 and H100 are those of benchmarks/results, rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = {
    "plain": "plain, `max_draft` 0",
    "plain in max_draft 2": "plain in the program for two drafts",
    "draft 1 in max_draft 2": "one draft a step",
    "draft 2 in max_draft 2": "two drafts a step",
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


def _result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"nvidia-{name}.json").read_text())


def _missing(lines: list[str]) -> list[str]:
    """Those of `lines` that the README does not have, wherever its own lines break."""
    flowing = " ".join(README.split())
    return [line for line in lines if line not in flowing]


def _us(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def test_decode() -> None:
    content = _result("h200-decode")
    simulated = {row["name"]: row for row in content["simulated"]}
    lines = []
    for row in content["rows"]:
        speed = f"{row['tokens_per_second']:.1f}" if row["tokens_per_second"] else ""
        if row["name"] in simulated:
            guess = simulated[row["name"]]
            speed = f"{guess['tokens_per_second']:.0f} at a *simulated* acceptance of {'/'.join(map(str, guess['acceptance']))}"
        size, fraction = f"{row['bytes'] / 1e9:.2f}", f"{row['fraction']:.2f}"
        lines.append(f"| {PROGRAMS[row['name']]} | {row['ms_per_step']:.2f} | {speed} | {size} | {fraction} |")
    plain = content["profiles"][0]
    lines.append(f"{plain['kernels']:.0f} kernels, {plain['kernels_per_layer']} a layer, and {plain['kernel_ms']:.2f} ms in them")
    lines.append(f"read no weights take {100 * plain['no_weights']:.0f} % of it")
    lines.append(f"copy bandwidth of the run {content['copy_gbps']:,.0f} GB/s")
    lines.append(f"Memory at its peak {content['peak_bytes'] / 1e9:.1f} GB")
    assert _missing(lines) == []


def test_calls() -> None:
    calls = _result("h200-decode")["calls"]
    lines = [f"runs at {calls['in_pieces']:.1f} tokens/s, and at {calls['in_one_call']:.1f} in one call"]
    assert _missing(lines) == []


def test_dspark() -> None:
    content = _result("h200-decode-0731")
    assert content["drafter"] == "dspark"
    assert content["lossless"]["equal"]
    speeds = {row["tokens_per_step"]: f"{row['tokens_per_second']:.0f}" for row in content["simulated_per_step"]}
    first, second, third = (speeds[tokens] for tokens in (4.42, 3.3, 2.5))
    lines = [f"{content['rows'][-1]['ms_per_step']:.2f} ms, its five drafts included"]
    lines.append(f"{first}, {second} and {third} tokens/s if a step commits 4.42, 3.3 and 2.5 tokens")
    assert _missing(lines) == []


def test_several_sequences() -> None:
    content = _result("h200-batch")
    rows = [row for row in content["rows"] if row["context"] == 2048 and not row["sampled"]]
    lines = []
    for row in rows:
        cells = f"{row['sequences']} | {row['ms_per_step']:.2f} | {row['tokens_per_second']:.0f} | {row['bytes'] / 1e9:.2f}"
        lines.append(f"| {cells} |")
    assert len(lines) == 5
    assert _missing(lines) == []


def test_decode_of_another_layout() -> None:
    content = _result("h200-decode-ud-iq3-xxs")
    [row] = content["rows"]
    size = f"UD-IQ3_XXS ({content['weight_bytes'] / 1e9:.1f} GB on the device)"
    assert _missing([f"{size} a plain step takes {row['ms_per_step']:.2f} ms: {row['tokens_per_second']:.1f} tokens/s"]) == []


def test_kernels() -> None:
    lines = []
    for card, name in {"H100": "h100-80gb-hbm3", "H200": "h200"}.items():
        content = _result(f"{name}-kernels")
        rows = {(row["name"], row["kind"], row["m"]): row for row in content["rows"]}
        for product, shape in SHAPES.items():
            ours = (rows[product, "share_warp", m] for m in (1, 2, 3, 4, 8))
            cells = " | ".join(f"{_us(row['us'])}, {row['fraction']:.2f}" for row in ours)
            dot = rows.get((product, "dot_bf16", 4))
            lines.append(f"| {product} {shape} | {card} | {cells} |" + (f" {_us(dot['us'])} |" if dot else " |"))
        lines.append(f"{content['copy_gbps']:,.0f} GB/s on the {card}")
    lines.append(f"the head's {rows['head', 'share_warp', 1]['fraction']:.2f}")
    assert _missing(lines) == []


def test_prompts_and_long_contexts() -> None:
    lines = []
    for row in _result("h200-prefill")["rows"]:
        cells = (f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}", *(f"{row['call_ms'][i]:.0f}" for i in (0, -1)))
        lines.append(f"| {' | '.join(cells)} | {row['temporary_bytes'] / 1e9:.2f} |")
    content = _result("h200-long")
    for row in content["rows"]:
        cells = (f"{row['context']:,}", row["cache"], f"{row['ms_per_step']:.2f}", f"{row['tokens_per_second']:.1f}")
        lines.append(f"| {' | '.join(cells)} | {row['relative']:.2f} | {row['cache_bytes'] / 1e9:.2f} |")
    lines.append(f"Beside {content['weight_bytes'] / 1e9:.1f} GB of weights")
    lines.append(f"peak is {max(row['peak_bytes'] for row in content['rows']) / 1e9:.1f} GB")
    assert _missing(lines) == []


def test_start_and_load() -> None:
    runs, load = _result("h200-start")["runs"], _result("h200-load")
    cold, warm, again = (f"{runs[name]['without_load']:.1f} s" for name in ("cold", "warm", "warm again"))
    lines = [f"{cold} after it began", f"{warm} when all is kept from an earlier one ({again} in a third)"]
    lines.append(f"runs at {load['gbps']['load']:.1f} GB/s, {load['ratio']:.2f} of what `cat` reads")
    lines.append(f"{load['bytes'] / 1e9:.1f} GB ([figures]")
    assert _missing(lines) == []
