"""The protocol of mailboxes: devices gather outputs by storing words into each other's memory, without another synchronisation.

Each device has a mailbox: two halves, in each a place for every word of every device. A word is 64 bits, a value of 32 and a
flag of 32. Exchanges are numbered from 0, and even and odd ones use different halves. In exchange n each device stores its
words with the flag of n into its places in all mailboxes. It reads a place of its own mailbox until the flag there is that of
n. A store of 64 bits is whole or not there, so the value is there when the flag is.

Two halves are enough. Who begins exchange n + 1 has read all words of n. So every device has sent n, and had read n - 1 before.
Nobody still reads what n + 1 replaces, the words of n - 1.

A word that does not come, because its device is lost or the numbers disagree, must not hang the reader: it looks a bounded
number of times and then says what was missing. Flags wrap, and none is 0, which is what a mailbox begins with.

No kernel uses it yet. This is the meaning that one has to have; it runs in threads over arrays of a host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

# Flags are 1 to this, then 1 again. They are many, so no word of an earlier round is left when its flag comes again.
FLAGS = 2**32 - 1
# Looks at a word before it counts as missing.
LOOKS = 1_000_000


class MissingWordError(RuntimeError):
    """A word did not come. The outputs cannot be used."""


def flag_of(exchange: int) -> int:
    """The flag of the words of an exchange, 1 to `FLAGS`."""
    return exchange % FLAGS + 1


def place_of(exchange: int, sender: int, devices: int, words: int) -> int:
    """The index of a sender's first word in a mailbox of 2 x `devices` x `words` words."""
    return (exchange % 2 * devices + sender) * words


def packed(values_n: np.ndarray, exchange: int) -> np.ndarray:
    """Words uint64 [n] of values of 32 bits."""
    return np.uint64(flag_of(exchange)) << np.uint64(32) | values_n.view(np.uint32).astype(np.uint64)


@dataclasses.dataclass
class Mailboxes:
    """The mailboxes of all devices, as one of them sees them.

    Attributes:
        boxes: uint64 [2 P n] of each device, zeros at the start.
        me: this device.
        words: n, the most words of a device in an exchange.
        exchange: the number of the next exchange, the same on all devices.
        looks: looks at a word before it counts as missing.
    """

    boxes: Sequence[np.ndarray]
    me: int
    words: int
    exchange: int = 0
    looks: int = LOOKS

    def gather(self, values_n: np.ndarray) -> np.ndarray:
        """The values of all devices, [P, n], from this one's; float32 or any type of 32 bits.

        Raises:
            MissingWordError: another device did not send. The message names it.
        """
        devices, number = len(self.boxes), self.exchange
        self.exchange += 1
        place, sent = place_of(number, self.me, devices, self.words), packed(values_n, number)
        for i, word in enumerate(sent):
            for box in self.boxes:
                box[place + i] = word
        found = [self._received(number, sender, len(values_n)) for sender in range(devices)]
        return np.stack(found).astype(np.uint32).view(values_n.dtype)

    def _received(self, number: int, sender: int, count: int) -> np.ndarray:
        own, expected = self.boxes[self.me], np.uint64(flag_of(number))
        place = place_of(number, sender, len(self.boxes), self.words)
        words = np.empty(count, np.uint64)
        for i in range(count):
            for _ in range(self.looks):
                words[i] = own[place + i]
                if words[i] >> np.uint64(32) == expected:
                    break
                # Lets the other threads of this host go on.
                time.sleep(0)
            else:
                raise MissingWordError(f"exchange {number}: word {i} of device {sender} did not come to device {self.me}")
        return words & np.uint64(0xFFFFFFFF)
