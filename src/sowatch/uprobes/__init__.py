"""Probes by library: BPF programs on functions of every file that a rule activates, now or later.

* ``probes.py``: `Probe`, what goes where; how programs of an object name their functions.
* ``attacher.py``: `Attacher`, the activation of a rule: resolves, attaches, verifies, repairs, detaches.
* ``calls.py``: `CallCounter`, the built-in program that counts and times calls.
"""

from __future__ import annotations

from sowatch.uprobes.attacher import Attacher, AttacherStats, Site
from sowatch.uprobes.calls import CallCounter, Calls
from sowatch.uprobes.probes import Probe

__all__ = ["Attacher", "AttacherStats", "CallCounter", "Calls", "Probe", "Site"]
