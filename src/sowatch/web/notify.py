"""Notifications to systemd, as sd_notify(3) has it: a datagram of a few words.

Imports nothing of the package. Written here: it is one socket, and no package for it is kept well.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]


class Notifier:
    """Notifies systemd how the service is; does nothing if systemd did not start it.

    Args:
        environment: where NOTIFY_SOCKET and WATCHDOG_USEC are.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        is_for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval = environment.get("WATCHDOG_USEC", "")
        #: How often `alive` is expected at least; None: not at all.
        self.watchdog_s = int(interval) / 1e6 if is_for_us and interval.isdigit() and int(interval) else None

    def ready(self, status: str) -> None:
        """It works, again after `reloading`."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """A line for ``systemctl status``."""
        self._send(f"STATUS={text}")

    def reloading(self) -> None:
        """It takes over another configuration."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It ends."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """It has not hung."""
        self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = self._address
        if address.startswith("@"):  # of the abstract namespace
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.settimeout(1.0)
            try:
                out.connect(address)
                out.send(text.encode())
            except OSError:
                return  # systemd notices by itself that nothing comes
