"""The device, its driver and JAX's plugin for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from ds4jax.doctor.probe import Probe
from ds4jax.doctor.row import Row
from ds4jax.nvidia import Card

# The oldest driver of each extra. Source: jax documentation, "Installation", section "NVIDIA GPU".
OLDEST_DRIVER = {"cuda13": 580, "cuda12": 525}


def rows(probe: Probe, cards: Sequence[Card], of: Callable[[str], str] = metadata.version) -> Iterator[Row]:
    """Rows for the device, the driver and the kernels.

    Args:
        of: version of a package by its name; raises `PackageNotFoundError`.
    """
    plugins = _plugins(of)
    yield Row("device", probe.device, _device(probe, cards, plugins), {"platform": probe.platform})
    driver = cards[0].driver if cards else None
    text = f"NVIDIA {driver}, {len(cards)} card{'s' if len(cards) > 1 else ''}" if driver else "no NVIDIA driver"
    yield Row("driver", text, _driver(driver, plugins), {"driver": driver, "plugins": plugins})
    yield Row("kernels", probe.kernels)


def _plugins(of: Callable[[str], str]) -> dict[str, str]:
    """The version of JAX's plugin for each installed extra."""
    found = {}
    for extra in OLDEST_DRIVER:
        try:
            found[extra] = of(f"jax-{extra}-plugin")
        except metadata.PackageNotFoundError:
            continue
    return found


def _device(probe: Probe, cards: Sequence[Card], plugins: dict[str, str]) -> str | None:
    """What is wrong with the device, and what to do; None if nothing is."""
    chosen = os.environ.get("JAX_PLATFORMS")
    if probe.platform is None:
        named = bool(chosen) and f"'{chosen}'" in probe.device
        remedy = f"unset JAX_PLATFORMS, which is {chosen}" if named else f"pip install --force-reinstall {_package(cards)}"
        return f"{probe.device}: {remedy}"
    if probe.platform != "cpu" or not cards or chosen:
        return None
    if not plugins:
        return f"jax runs on the CPU, and has no plugin for the NVIDIA GPU: pip install {_package(cards)}"
    return f"jax runs on the CPU, although it has a plugin for the NVIDIA GPU: pip install --force-reinstall {_package(cards)}"


def _driver(driver: str | None, plugins: dict[str, str]) -> str | None:
    """What is wrong with the driver, and what to do; None if nothing is."""
    if driver is None:
        return None
    major = int(driver.split(".")[0])
    usable = [extra for extra in plugins if major >= OLDEST_DRIVER[extra]]
    if usable or not plugins:
        return None
    extra = next(iter(plugins))
    other = " or pip install 'ds4jax[cuda12]'" if major >= OLDEST_DRIVER["cuda12"] else ""
    return f"driver {driver} is too old for {extra}: install driver {OLDEST_DRIVER[extra]} or newer{other}"


def _package(cards: Sequence[Card]) -> str:
    """Ds4jax as pip takes it, with the extra for the driver."""
    if not cards:
        return "ds4jax"
    newest = int(cards[0].driver.split(".")[0]) >= OLDEST_DRIVER["cuda13"]
    return f"'ds4jax[{'cuda13' if newest else 'cuda12'}]'"
