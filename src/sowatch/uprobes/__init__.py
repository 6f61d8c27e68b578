"""Probes by library: BPF programs on functions of every file that a rule activates, now or later.

* ``probes.py``: `Probe`, what goes where; how programs of an object name their functions.
* ``attacher.py``: `Attacher`, the activation of a rule: resolves, attaches, verifies, repairs, detaches.
* ``records.py``: what an attacher says of itself: files, attachments, failures, gauges.
* ``calls.py``: `CallCounter`, the built-in program that counts and times calls, records them, and counts callers.
* ``call_format.py``: `CallFormat`, what is recorded of a call; ``call_records.py``: `Call`, one of them.
* ``address_book.py``: which function an address is in, also of processes that are gone.
* ``trace.py``: what `sowatch trace` does.
"""

from __future__ import annotations

from sowatch.uprobes.attacher import Attacher
from sowatch.uprobes.call_format import CallFormat, parse_function
from sowatch.uprobes.call_records import Call
from sowatch.uprobes.calls import CallCounter, Calls
from sowatch.uprobes.probes import Probe, all_of, best_effort
from sowatch.uprobes.records import AttachedFile, AttacherStats, Attachment, Failure, Site

__all__ = [
    "AttachedFile",
    "Attacher",
    "AttacherStats",
    "Attachment",
    "Call",
    "CallCounter",
    "CallFormat",
    "Calls",
    "Failure",
    "Probe",
    "Site",
    "all_of",
    "best_effort",
    "parse_function",
]
