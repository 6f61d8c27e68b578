"""What changed since a client last asked. Imports nothing of the package.

Each client (an exporter, a log line, a payload) has a past of its own, so none takes another's
increases away. A client that does not come back is forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

__all__ = ["TTL_S", "ClientDeltas", "Deltas"]

#: After so long without a question a client is forgotten, and begins anew.
TTL_S: Final = 300.0


class ClientDeltas:
    """The past of one client. Made by `Deltas`.

    Attributes:
        elapsed_s: time between its last two questions; 0 at the first.
    """

    __slots__ = ("_lock", "_seen", "asked_s", "elapsed_s")

    def __init__(self, now_s: float) -> None:
        self._lock = threading.Lock()
        # By identity, with the object itself, so that the id cannot pass to another.
        self._seen: dict[int, tuple[object, int | float]] = {}
        self.asked_s = now_s
        self.elapsed_s = 0.0

    def of(self, metric: object, value: float, *, is_rising: bool) -> int | float:
        """The growth since the last time if it only rises, else the value itself."""
        if not is_rising:
            return value
        with self._lock:
            _, before = self._seen.get(id(metric), (metric, 0))
            # Two threads of one client may bring their values in the wrong order.
            self._seen[id(metric)] = (metric, max(before, value))
        return max(0, value - before)


class Deltas:
    """The pasts of all clients. May be used from any thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: dict[str, ClientDeltas] = {}

    def since(self, client_id: str) -> ClientDeltas:
        """The past of a client, who asks now."""
        now_s = self._clock()
        with self._lock:
            self._clients = {name: one for name, one in self._clients.items() if now_s - one.asked_s < TTL_S}
            client = self._clients.get(client_id)
            if client is None:
                client = self._clients[client_id] = ClientDeltas(now_s)
            client.elapsed_s = now_s - client.asked_s
            client.asked_s = now_s
            return client
