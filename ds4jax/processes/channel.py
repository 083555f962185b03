"""Messages between two processes: fields as JSON, and arrays."""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Maximum bytes of a message's fields. What claims more is not of this package.
MOST = 1 << 20
_SIZE = struct.Struct("<I")
# When the other host counts as lost: seconds of silence, seconds between probes, probes without an answer, and milliseconds
# without a sign that it has what was sent.
_LOST = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}


class Message(NamedTuple):
    """Fields of a message, and its arrays."""

    fields: dict[str, Any]
    arrays: list[np.ndarray]


class Channel:
    """One end of a connection. Several threads may send, one receives."""

    def __init__(self, connection: socket.socket):
        """Args: `connection`, a TCP socket, which the channel keeps."""
        self.socket = connection
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _LOST.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, fields: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send a message.

        Raises:
            OSError: the connection is broken.
        """
        kinds = [[array.dtype.name, array.shape] for array in arrays]
        head = json.dumps([fields, kinds]).encode()
        with self._sending:
            self.socket.sendall(_SIZE.pack(len(head)) + head)
            for array in arrays:
                self.socket.sendall(np.ascontiguousarray(array).tobytes())

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            OSError: the connection is broken or was closed.
            ValueError: this is no message.
        """
        (size,) = _SIZE.unpack(self._exactly(_SIZE.size))
        if size > MOST:
            raise ValueError(f"a message of {size} bytes of fields")
        fields, kinds = json.loads(self._exactly(size))
        return Message(fields, [self._array(np.dtype(name), tuple(shape)) for name, shape in kinds])

    def _array(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(self._exactly(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

    def _exactly(self, size: int) -> bytes:
        # Nothing more is read, because other bytes may follow the first message of a connection.
        found = bytearray(size)
        view = memoryview(found)
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the connection was closed")
            view = view[count:]
        return bytes(found)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
