"""Words of mailboxes in kernel bodies: PTX on addresses on the GPU, the same on an array in interpret mode.

Pallas declares inline assembly free of side effects. A compiler may then leave out what nobody reads, merge what is equal, and
change the order of what does not depend on each other. So every operation returns a value that a later one takes, and only `take`
changes what it read. It must run once: arrays of a program have one value for each thread, so that no change of layout, which
could repeat it, lies between it and the stores.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core.arithmetic import assembly
from pallas_kernels.linear.mailbox import FLAGS, LOOKS

# The bits of the value in place of a missing word, a float32 NaN.
POISON = 0x7FC00000
_AT = "mov.b64 box, {$1, $2}; cvt.u64.u32 off, $3; add.u64 at, box, off; "
_REGISTERS = ".reg .b64 box, at, off, word; .reg .b32 low, flag, lost, n; .reg .pred p, q; "
_TAKE = (
    f"{{ {_REGISTERS}{_AT}setp.ne.s32 p, $5, 0; mov.u32 flag, 0; "
    "@p ld.relaxed.sys.global.b64 word, [at]; ld.relaxed.sys.global.b32 lost, [box]; @p mov.b64 {low, flag}, word; "
    # Missing words, or no word in this lane: flag 0.
    f"setp.eq.and.u32 p, lost, 0, p; setp.ge.u32 q, flag, {FLAGS:#x}; selp.b32 flag, 0, flag, q; add.u32 flag, flag, 1; "
    "selp.b32 flag, flag, 0, p; mov.b64 word, {$4, flag}; @p st.relaxed.sys.global.b64 [at], word; mov.b32 $0, flag; }"
)
_SEND = (
    f"{{ {_REGISTERS}{_AT}setp.ne.s32 p, $5, 0; mov.b64 word, {{$4, $5}}; "
    "@p st.relaxed.sys.global.b64 [at], word; mov.b32 $0, $4; }"
)
_WAIT = (
    f"{{ {_REGISTERS}{_AT}setp.eq.s32 p, $4, 0; mov.u32 n, 0; mov.u32 low, {POISON:#x}; @p bra DONE; "
    "AGAIN: ld.relaxed.sys.global.b64 word, [at]; mov.b64 {low, flag}, word; setp.eq.u32 p, flag, $4; @p bra DONE; "
    f"add.u32 n, n, 1; setp.lt.u32 q, n, {LOOKS}; @q bra AGAIN; "
    f"mov.u32 low, {POISON:#x}; st.relaxed.sys.global.b32 [box+4], $5; red.relaxed.sys.global.add.u32 [box], 1; "
    "DONE: mov.b32 $0, low; }"
)
_LOOK = f"{{ {_REGISTERS}{_AT}ld.relaxed.sys.global.b32 $0, [at]; }}"


class Box(Protocol):
    """A device's mailbox; places are indices of words, int32 of any shape."""

    def take(self, place: jax.Array, value: jax.Array, live: jax.Array) -> jax.Array:
        """The next flags of own places, which then hold them; 0 where not `live`, and where words were missing before."""

    def send(self, place: jax.Array, value: jax.Array, flag: jax.Array) -> jax.Array:
        """Store words, none where the flag is 0. Returns the values."""

    def wait(self, place: jax.Array, flag: jax.Array, sender: jax.Array, after: jax.Array) -> jax.Array:
        """The values of the words with these flags; `POISON` where one does not come or the flag is 0.

        Args:
            sender: whose words they are, to be written down if one does not come.
            after: what `send` returned last.
        """


@dataclasses.dataclass(frozen=True)
class Remote:
    """A mailbox by its address. GPU only.

    Attributes:
        low, high: int32 of the arrays' shape, the halves of the address.
    """

    low: jax.Array
    high: jax.Array

    def take(self, place: jax.Array, value: jax.Array, live: jax.Array) -> jax.Array:
        """As in `Box`."""
        return self._run(_TAKE, place, value, live.astype(jnp.int32))

    def send(self, place: jax.Array, value: jax.Array, flag: jax.Array) -> jax.Array:
        """As in `Box`."""
        return self._run(_SEND, place, value, flag)

    def wait(self, place: jax.Array, flag: jax.Array, sender: jax.Array, after: jax.Array) -> jax.Array:
        """As in `Box`."""
        return self._run(_WAIT, place, flag, jnp.broadcast_to(sender + 1, flag.shape), after)

    def look(self, half_word: jax.Array) -> jax.Array:
        """Words of 32 bits by their index, int32."""
        return assembly(_LOOK, "=r,r,r,r", jnp.int32, self.low, self.high, half_word * 4)

    def _run(self, code: str, place: jax.Array, *values: jax.Array) -> jax.Array:
        constraints = ",".join(["=r", *["r"] * (3 + len(values))])
        return assembly(code, constraints, jnp.int32, self.low, self.high, place * 8, *values)


@dataclasses.dataclass(frozen=True)
class Twin:
    """The same on a reference to int32 [P, words, 2], the mailboxes of all devices with values and flags. Looks once.

    Attributes:
        device: whose mailbox this is.
    """

    boxes: Any
    device: jax.Array

    def held(self, place: jax.Array, live: jax.Array) -> jax.Array:
        """What `take` returned before: flags of own places, 0 as there."""
        return jnp.where(live & ~self._lost(), self._load(place, 1, live), 0)

    def take(self, place: jax.Array, value: jax.Array, live: jax.Array) -> jax.Array:
        """As in `Box`."""
        last = self._load(place, 1, live)
        after = jnp.where(last == FLAGS - (1 << 32), 1, last + 1)
        flag = jnp.where(live & ~self._lost(), after, 0)
        self.send(place, value, flag)
        return flag

    def send(self, place: jax.Array, value: jax.Array, flag: jax.Array) -> jax.Array:
        """As in `Box`."""
        # What is not sent has a place that does not exist.
        place = jnp.where(flag != 0, place, self.boxes.shape[1])
        for part, array in enumerate((value, flag)):
            plt.store(self._at(place, part), array, mask=flag != 0)
        return value

    def wait(self, place: jax.Array, flag: jax.Array, sender: jax.Array, after: jax.Array) -> jax.Array:
        """As in `Box`."""
        del after
        there = (self._load(place, 1, flag != 0) == flag) & (flag != 0)
        missing = jnp.sum((flag != 0) & ~there, dtype=jnp.int32)
        self.boxes[self.device, 0, 0] += missing
        self.boxes[self.device, 0, 1] = jnp.where(missing > 0, sender + 1, self.boxes[self.device, 0, 1])
        return jnp.where(there, self._load(place, 0, there), POISON)

    def _lost(self) -> jax.Array:
        lost: jax.Array = self.boxes[self.device, 0, 0] != 0
        return lost

    def _at(self, place: jax.Array, part: int) -> Any:
        return self.boxes.at[jnp.broadcast_to(self.device, place.shape), place, jnp.full(place.shape, part, jnp.int32)]

    def _load(self, place: jax.Array, part: int, mask: jax.Array) -> jax.Array:
        loaded: jax.Array = plt.load(self._at(place, part), mask=mask, other=0)
        return loaded
