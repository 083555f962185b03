"""Reports of the server benchmark: lines on stdout, and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4jax.bench.serve import MIN_SHARE, MOST_EXTRA_MS
from ds4jax.files import replacing

_NAMES = {
    "first_ms": "first token, ms",
    "token_ms": "a token after it, ms",
    "piece_ms": "between two pieces, ms",
    "tokens_per_second": "tokens/s of a reply",
}


def show(content: Mapping[str, Any]) -> None:
    """Print the comparison and the percentiles on stdout."""
    where = content.get("url") or f"{content['slots']} slots, context {content['context']}"
    print(
        f"{content['device']}, jax {content['jax']}, load {content['load']}: {where}, prompts of {content['prompt']} tokens, "
        f"replies of {content['tokens']}"
    )
    if compared := content.get("compared"):
        _show_compared(compared)
    if found := content.get("open_loop"):
        print(
            f"{found['requests']} requests at {found['rate']:g} a second, {found['failures']} failed: "
            f"{found['whole_tokens_per_second']} tokens/s together, sent at most {found['late_ms']} ms late"
        )
        for name, text in _NAMES.items():
            shares = ", ".join(f"{share} {value:g}" for share, value in found[name].items())
            print(f"  {text:<24} {shares}")
        for error in found["failed"]:
            print(f"  failed: {error}")


def _show_compared(compared: Mapping[str, Any]) -> None:
    first, streams = compared["first"], compared["streams"]
    verdict = "reached" if first["extra_ms"] <= MOST_EXTRA_MS else "not reached"
    print(
        f"  first token: engine {first['engine']:.2f} ms, over HTTP {first['http']:.2f} ms; "
        f"{first['extra_ms']:+.2f} ms in pairs, target at most {MOST_EXTRA_MS:g}: {verdict}; "
        f"{first['fastest_extra_ms']:+.2f} ms at the fastest tenth"
    )
    verdict = "reached" if streams["share"] >= MIN_SHARE else "not reached"
    print(
        f"  {streams['count']} streams: engine {streams['engine']:.1f} tokens/s, over HTTP {streams['http']:.1f}; "
        f"{streams['share']:.3f} in pairs, target at least {MIN_SHARE}: {verdict}"
    )
    print(f"  bits: {compared['different']} runs with other bits over HTTP")


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the share of requests whose first token came within a time, and the compared runs if there are any."""
    from matplotlib.figure import Figure

    compared, found = content.get("compared"), content.get("open_loop")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if found and found["first_each_ms"]:
        times = sorted(found["first_each_ms"])
        left.step(times, [(i + 1) / len(times) for i in range(len(times))], where="post")
        left.set_title(f"{found['requests']} requests at {found['rate']:g} a second")
    left.set(xlabel="ms to the first token", ylabel="share of requests", ylim=(0, 1.05))
    left.grid(alpha=0.3)
    if compared:
        for name, mark in (("engine", "o"), ("http", "s")):
            right.plot(compared["streams"]["runs"][name], mark, label=name)
        right.set_title(f"{compared['streams']['count']} streams, HTTP at {compared['streams']['share']:.3f} of the engine")
        right.legend()
    right.set(xlabel="pair", ylabel="tokens/s together", ylim=(0, None))
    right.grid(alpha=0.3)
    figure.suptitle(f"ds4jax serve on {content['device']}")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)
