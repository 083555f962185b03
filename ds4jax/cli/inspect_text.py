"""The output of `ds4jax inspect` as text."""

from __future__ import annotations

from typing import Any

from ds4jax.bounds import SLOTS


def model_text(found: dict[str, Any]) -> str:
    """A model: what `summary` returns, with plan, decode_step, costs, and dispatch where it was asked for."""
    shards = f", {found['shards']} files" if found["shards"] > 1 else ""
    lines = [f"{found['path']}: {found['kind']}, {found['values']:,} values in {found['bytes'] / 1e6:,.1f} MB"]
    lines += [f"flavour      {found['flavour']}{shards}", f"drafter      {_drafter(found['drafter'])}"]
    lines += ["", "config"]
    lines += [f"  {name:<22} {_value(value)}" for name, value in found["config"].items()]
    lines += ["", f"tensors      {'count':>8} {'values':>18} {'bytes':>18} {'on the device':>18}"]
    for kind, row in found["tensors"].items():
        sizes = f"{row['values']:>18,} {row['bytes']:>18,} {row['device_bytes']:>18,}"
        lines.append(f"  {kind:<10} {row['count']:>8,} {sizes}")
    lines += ["", "types, with the layers that have them", *_type_lines(found["types"])]
    lines += ["", f"note         {found['note']}"] if found["note"] else []
    lines += ["", *_plan_lines(found["plan"])]
    lines += ["", *_step_lines(found["decode_step"]), *_cost_lines(found["costs"])]
    lines += ["", f"tokenizer    {found['vocabulary']:,} tokens" if found["vocabulary"] else "tokenizer    none"]
    # The origin of the file. The other metadata repeat the configuration.
    origin = {key: value for key, value in found["metadata"].items() if key.startswith(("general.", "ds4jax."))}
    if origin:
        lines += ["", "origin", *(f"  {key:<34} {_value(value)}" for key, value in origin.items())]
    if "dispatch" in found:
        lines += ["", *_dispatch_lines(found["dispatch"]), "", *_expert_lines(found["prompt_experts"])]
        lines += ["", "exchanges of a decode step between GPUs, by --exchange"]
        lines += [f"  {name:<28} {way}" for name, way in found["exchange"].items()]
    return "\n".join(lines)


def drafter_text(found: dict[str, Any]) -> str:
    """A drafter's own file: what `drafters.describe` returns."""
    mtp = found["drafter"] == "mtp"
    kind = "the MTP block of a model" if mtp else "the DSpark drafter of a model"
    lines = [f"{found['path']}: {kind}, {found['bytes'] / 1e6:,.1f} MB"]
    own = ("layer",) if mtp else ("block_size", "target_layers", "noise_token", "markov_rank")
    fields = [field for field in ("architecture", "name", "layers", *own) if found[field] is not None]
    lines += [f"  {field.replace('_', ' '):<16} {_value(found[field])}" for field in fields]
    return "\n".join(
        [*lines, f"  {'tensors':<16} {', '.join(f'{count} {stored}' for stored, count in found['tensors'].items())}"]
    )


def _drafter(found: dict[str, Any]) -> str:
    reason = f": {found['reason']}" if found["reason"] else ""
    if not found["where"]:
        return f"{found['kind']}{reason}"
    where = "inside" if found["where"] == "inside" else f"in {found['path']}"
    if found["kind"] == "mtp":
        return f"MTP block {where}"
    own = ("stages", "block_size", "target_layers", "noise_token", "markov_rank")
    return f"DSpark {where}: " + "; ".join(f"{field.replace('_', ' ')} {_value(found[field])}" for field in own)


def _type_lines(groups: list[dict[str, Any]]) -> list[str]:
    """A line for each class; where its tensors differ, with their names."""
    kinds: dict[str, list[str]] = {}
    count = [group["kind"] for group in groups].count
    for group in groups:
        own = dict.fromkeys(name.rpartition(".")[2] for name in group["names"])
        names = f" ({', '.join(own)})" if count(group["kind"]) > 1 else ""
        types = "; ".join(f"{stored} {layers}".strip() for stored, layers in group["types"].items())
        kinds.setdefault(group["kind"], []).append(types + names)
    return [f"  {kind:<18} {' | '.join(types)}" for kind, types in kinds.items()]


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan as text, in MB of a million bytes."""
    lines = [f"{'plan, in MB':<26} {'file':>12} {'device':>12} {'read a token':>14}"]
    rows = {name: (part["file"], part["device"], part["token"]) for name, part in plan["classes"].items()}
    rows["weights"] = (sum(row[0] for row in rows.values()), sum(row[1] for row in rows.values()), 0)
    rows["weights"] = (*rows["weights"][:2], plan["token"] - plan["cache_token"])
    many = f"{plan['slots']} x " if plan["slots"] > 1 else ""
    rows[f"cache of {many}{plan['context']:,}"] = (0, plan["cache"], plan["cache_token"])
    rows["working memory"] = (0, plan["working"], 0)
    rows["all"] = (rows["weights"][0], plan["needed"], plan["token"])
    lines += [f"  {name:<24} {_mb(sizes[0]):>12} {_mb(sizes[1]):>12} {_mb(sizes[2]):>14}" for name, sizes in rows.items()]
    lines.append(f"  a token of context adds {plan['cache_values']:,g} values to the cache, {plan['cache_bytes']:,.0f} bytes")
    if plan["draft"]:
        what = "a block of DSpark drafts" if plan["classes"]["DSpark"]["device"] else "a draft of the MTP block"
        lines.append(f"  {what} reads {_mb(plan['draft'])} more")
    return [*lines, *map(_device_line, plan["devices"])]


def _device_line(device: dict[str, Any]) -> str:
    rate = f", at most {device['tokens_per_second']:,.1f} tokens/s" if device["tokens_per_second"] is not None else ""
    most = device["largest_context"]
    fits = "fits" if device["fits"] else "does not fit"
    slots = device["most_slots"]
    room = f"room for a context of {most:,}" if most else "no room for any context"
    room += f", or for {slots if slots < (SLOTS.largest or 0) else 'any number of'} slots" if slots > 1 else ""
    size = f"{device['memory'] / 1e9:,.0f} GB"
    if device["modelled"]:
        groups = f" in {device['groups']} groups" if device["groups"] > 1 else ""
        size = f"{device['cards']} x {size}{groups}, modelled, {_mb(device['needed'])} MB on each"
        size += f" with all of {', '.join(device['whole'])}" if device["whole"] else ""
    if rate and device["gathers"]:
        rate += f" with {device['gathers']} exchanges, {device['exchange_ms']:g} ms"
    calls = f", prompts in calls of {device['chunk']:,}" if device["fits"] and not device["modelled"] else ""
    return f"  {device['name']}: {size}: {fits}, {room}{rate}{calls}"


def _step_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'in a decode step':<30} {'at most':>14} {'count':>5}  path (on CUDA / elsewhere) and reason"]
    for row in rows:
        path = row["cuda"] if row["cuda"] == row["default"] else f"{row['cuda']} / {row['default']}"
        part = f"layers {row['layers']}" if row["part"] == "layers" else row["part"]
        at_most = f"{row['rows']} rows"
        lines.append(f"  {part:<28} {at_most:>14} {row['count']:>5}  {path} ({row['reason']})")
    return lines


def _cost_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", f"{'more than stored, in MB':<30} {'read a token':>14} {'expanded':>14}  why"]
    said = {
        "float32 in memory": "the device holds float32 values, so much more than the file",
        "no kernel": "no kernel for few rows: a step multiplies out so many float32 values",
    }
    for row in rows:
        what = f"{row['kind']} {row['stored']}"
        where = f"; layers {row['layers']}" if row["layers"] else ""
        lines.append(f"  {what:<28} {_mb(row['read']):>14} {_mb(row['expanded']):>14}  {said[row['why']]}{where}")
    return lines


def _dispatch_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'product':<30} {'shape':>14} {'stored':>8} {'device':>7} {'count':>5}  path (on CUDA / elsewhere) and reason"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        lines.append(f"  {row['product']:<28} {shape:>14} {row['stored']:>8} {row['device']:>7} {row['count']:>5}  {_paths(row)}")
    return lines


def _expert_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'experts of a prompt':<45} {'count':>5}  path (on Hopper / other CUDA / elsewhere) and reason"]
    for row in rows:
        part = f"layers {row['layers']}" if row["part"] == "layers" else row["part"]
        path = " / ".join(row[where] for where in ("hopper", "cuda", "default"))
        lines.append(f"  {part:<43} {row['count']:>5}  {path} ({row['reason']})")
    return lines


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}" if nbytes else "-"


def _paths(row: dict[str, Any]) -> str:
    """The paths of a product as text."""
    parts = []
    for name in ("decode", "prefill", "strict"):
        path = row[name]
        where = path["cuda"] if path["cuda"] == path["default"] else f"{path['cuda']} / {path['default']}"
        parts.append(f"{name}: {where} ({path['reason']})")
    return "; ".join(parts)


def _value(value: Any) -> str:
    """One line for any value."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value).replace("\n", " ")
