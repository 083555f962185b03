"""The protocol of mailboxes: devices gather outputs by storing words into each other's memory, without another synchronisation.

A word has 64 bits, a value of 32 and a flag of 32. A store of 64 bits is whole or not there, so the value is there when the flag
is. A mailbox has two halves, in each a place for every word of every device, and before them one word that says what is missing.
Word i of an exchange has place i of its sender, in exchanges of any size, so that small ones use the first places again.

Every place counts for itself: a device's own word i, in the first half of its own mailbox, holds the flag that the device sent
last with word i. The next flag is that plus one, from 1 to `FLAGS` and then 1 again. A flag is never 0, which an empty mailbox
holds. `FLAGS` is even, so that odd and even flags alternate where they wrap, too. Words of odd flags go to one half, of even ones
to the other. In an exchange of n words a device takes the next flag of each of its first n places, stores its words with them
into all other mailboxes, and reads each of the others' places in its own until the flag there is the one that it took.

Two halves are enough, if the exchanges of a device follow each other and all devices make the same ones. For each i apart: number
the exchanges with a word i. All devices count the same ones, so their flags of number k are equal. Who stores word i of number
k + 1 has ended number k, so it read word i of number k of every other device. Each of these had begun number k, so it had
ended number k - 1 and read word i of it. Thus nobody still reads what k + 1 replaces, the word of k - 1 in the same half.
Only numbers k and k + 1 are on their way, whose flags differ, so no word is taken for another.

A word that does not come, because its device is lost or makes other exchanges, must not hang the reader. It looks `LOOKS` times,
then writes down whose word is missing, and its output is NaN. From then on it takes no flags: it sends nothing and does not wait.
So the others miss its words at their next exchange. Nothing can be gathered by these mailboxes again.

This is the meaning, in threads over arrays of a host; the kernel is in `pallas_kernels.linear.mailbox_gather`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

# Flags are 1 to this, then 1 again; an even number.
FLAGS = 2**32 - 2
# Looks at a word before it counts as missing: many, because a device may be late by a pause of the thread that launches its work.
LOOKS = 10_000_000
# Words before the halves. The first has the number of missing words, and above it 1 + the device that did not send the last one.
HEADER = 2


class MissingWordError(RuntimeError):
    """A word did not come. The outputs cannot be used, and the mailboxes not again."""


def next_flag(flag: int) -> int:
    """The flag after this one, 1 to `FLAGS`."""
    return flag + 1 if flag < FLAGS else 1


def place_of(half: int, sender: int, word: int, devices: int, words: int) -> int:
    """The index in a mailbox of a sender's word; `words` are the places of a sender."""
    return HEADER + (half * devices + sender) * words + word


def size_of(devices: int, words: int) -> int:
    """The number of words of a mailbox."""
    return HEADER + 2 * devices * words


@dataclasses.dataclass
class Mailboxes:
    """The mailboxes of all devices, as one of them sees them.

    Attributes:
        boxes: uint64 of each device, zeros at the start; see `size_of`.
        me: this device.
        words: maximum words of a device in an exchange.
        looks: looks at a word before it counts as missing.
    """

    boxes: Sequence[np.ndarray]
    me: int
    words: int
    looks: int = LOOKS

    def gather(self, values_n: np.ndarray) -> np.ndarray:
        """The values of all devices, [P, n], from this one's; float32 or any type of 32 bits.

        Raises:
            MissingWordError: another device did not send, in this exchange or an earlier one. The message names it.
        """
        own, bits_n = self.boxes[self.me], values_n.view(np.uint32)
        if own[0]:
            raise MissingWordError(f"device {self.me} has missed words before")
        flags = [self._sent(i, int(bits)) for i, bits in enumerate(bits_n)]
        others = [bits_n if sender == self.me else self._received(sender, flags) for sender in range(len(self.boxes))]
        return np.stack(others).view(values_n.dtype)

    def _place(self, flag: int, sender: int, word: int) -> int:
        return place_of(flag % 2, sender, word, len(self.boxes), self.words)

    def _sent(self, i: int, bits: int) -> int:
        """Store word i into all other mailboxes. Returns its flag."""
        own, counter = self.boxes[self.me], self._place(0, self.me, i)
        flag = next_flag(int(own[counter]) >> 32)
        own[counter] = word = np.uint64(flag << 32 | bits)
        for device, box in enumerate(self.boxes):
            if device != self.me:
                box[self._place(flag, self.me, i)] = word
        return flag

    def _received(self, sender: int, flags: Sequence[int]) -> np.ndarray:
        own, values = self.boxes[self.me], np.empty(len(flags), np.uint32)
        for i, flag in enumerate(flags):
            for _ in range(self.looks):
                word = int(own[self._place(flag, sender, i)])
                if word >> 32 == flag:
                    break
                # Lets the other threads of this host go on.
                time.sleep(0)
            else:
                own[0] = np.uint64((1 + sender) << 32 | 1)
                raise MissingWordError(f"word {i} of device {sender} did not come to device {self.me}")
            values[i] = word & 0xFFFFFFFF
        return values
