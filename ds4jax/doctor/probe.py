"""The device that JAX starts on, and the kernels of a decode step there."""

from __future__ import annotations

import dataclasses
import os

from ds4jax.doctor.child import ChildError, objects, say

# For `--version`. Starting JAX takes a second or two. If a driver hangs, the rest must still be printed.
SECONDS = 10.0
PROGRAM = "from ds4jax.doctor.probe import main; main()"
PATHS = {
    "pallas": "pallas share-warp",
    "xla": "jnp, quantised arithmetic",
    "dot": "jnp.dot, float32",
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """What JAX says of this machine.

    Attributes:
        device: kind and number of devices, or why JAX does not start.
        kernels: path of a Q8_0 product of one row, with its reason.
        platform: JAX's name of it, such as cpu or gpu; None if JAX does not start.
    """

    device: str
    kernels: str
    platform: str | None


def probe(seconds: float | None = None) -> Probe:
    """Start JAX in a process of its own and ask it. Takes at most these seconds, by default `SECONDS`."""
    try:
        return next(Probe(**fields) for fields in objects(PROGRAM, seconds or SECONDS))
    except StopIteration:
        reason = "it printed nothing"
    except ChildError as error:
        reason = str(error)
    return Probe(f"jax does not start: {reason}", "none without a device", None)


def main() -> None:
    """In the child: start JAX, and print its device and the path of a Q8_0 product of one row there."""
    import jax

    from pallas_kernels.core.dispatch import choose
    from pallas_kernels.formats import Q8_0

    first, *others = jax.devices()
    strict = os.environ.get("DS4JAX_STRICT") == "1"
    choice = choose(1, Q8_0, strict=strict)
    path = choice.cuda if first.platform in ("gpu", "cuda") else choice.default
    device = f"{1 + len(others)} × {first.device_kind}" if others else first.device_kind
    kernels = f"{PATHS[path]} ({'DS4JAX_STRICT=1' if strict else choice.reason})"
    say(device=device, kernels=kernels, platform=first.platform)
