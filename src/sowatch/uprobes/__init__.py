"""Probes by library: BPF programs on functions of every file that a rule activates, now or later.

* ``probes.py``: `Probe`, what goes where; how programs of an object name their functions.
* ``attacher.py``: `Attacher`, the activation of a rule: resolves, attaches, verifies, repairs, detaches.
* ``records.py``: what an attacher says of itself: files, attachments, failures, gauges.
* ``calls.py``: `CallCounter`, the built-in program that counts and times calls.
"""

from __future__ import annotations

from sowatch.uprobes.attacher import Attacher
from sowatch.uprobes.calls import CallCounter, Calls
from sowatch.uprobes.probes import Probe
from sowatch.uprobes.records import AttachedFile, AttacherStats, Attachment, Failure, Site

__all__ = [
    "AttachedFile",
    "Attacher",
    "AttacherStats",
    "Attachment",
    "CallCounter",
    "Calls",
    "Failure",
    "Probe",
    "Site",
]
