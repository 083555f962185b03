"""How many tokens or steps a call of the loop makes: enough that it costs little itself, and so few that no reader waits."""

from __future__ import annotations

# Maximum seconds of a call, a tenth below the 50 ms within which a reader gets a piece.
PIECE_SECONDS = 0.045
# A call's own cost is at most this share of its time, where the bound above allows it.
OWN_SHARE = 0.03
# Tokens of a piece of a stream. They are few numbers, because the device keeps an array for each. The report of a call holds the
# largest, see `ds4jax.decode.loop.REPORTED`.
PIECES = (8, 16, 24, 32, 48, 64)
# Weight of the latest measurement.
LATEST = 0.25


def piece(seconds: float) -> int:
    """Tokens of a stream's next piece: as many as come within `PIECE_SECONDS`.

    Args:
        seconds: time of a token; 0 if it is not known.
    """
    return max((size for size in PIECES if seconds and size * seconds <= PIECE_SECONDS), default=PIECES[0])


class Pace:
    """Measured times of the calls, in seconds, and the number of steps that follows from them.

    Attributes:
        step: time of a step; 0 before the first call.
        own: time of a call without steps, and of the host's work between two calls.
    """

    def __init__(self, own: float = 0.0):
        self.step, self.own = 0.0, own
        self._empty = own

    def steps(self) -> int:
        """Steps of the next call, at least 1.

        The smallest number at which a call's own cost is at most `OWN_SHARE`, because cancelled and new requests wait for the end
        of a call; fewer if that takes longer than `PIECE_SECONDS`.
        """
        if not self.step:
            return 1
        return max(1, int(min(PIECE_SECONDS - self.own, self.own / OWN_SHARE) / self.step))

    def called(self, seconds: float, steps: int) -> None:
        """Note a call: its time, with what its launch costs, and the steps that it made."""
        if steps:
            step = max(seconds - self._empty, 1e-6) / steps
            # Longer steps count at once, so that the next call is not too long.
            self.step = max(step, self.step + LATEST * (step - self.step)) if self.step else step

    def between(self, seconds: float) -> None:
        """Note the host's time between two calls."""
        self.own += LATEST * (self._empty + seconds - self.own)
