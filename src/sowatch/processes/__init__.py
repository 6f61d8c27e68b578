"""Processes as they come, change their program and go; and which container they belong to.

May import ``errors``, ``identity``, ``events``, ``procfs``, ``config`` and ``registry``.

* ``records.py``: what the monitor takes (`ProcessFeed`) and gives (`ProcessEvent`).
* ``containers.py``: `container_id`, from a cgroup.
* ``known.py``: which processes the subscribers were told of, compared with ``/proc``.
* ``delivery.py``: the queue and the thread that runs callbacks.
* ``run.py``: one run of a monitor: the thread that drains, and repairs.
* ``monitor.py``: `ProcessMonitor`.
"""

from sowatch.processes.containers import CONTAINER_FORMS, ContainerForm, container_id
from sowatch.processes.monitor import ProcessMonitor
from sowatch.processes.records import (
    ProcessCallback,
    ProcessCause,
    ProcessEvent,
    ProcessFeed,
    ProcessKind,
    ProcessMonitorStats,
    Unsubscribe,
)

__all__ = [
    "CONTAINER_FORMS",
    "ContainerForm",
    "ProcessCallback",
    "ProcessCause",
    "ProcessEvent",
    "ProcessFeed",
    "ProcessKind",
    "ProcessMonitor",
    "ProcessMonitorStats",
    "Unsubscribe",
    "container_id",
]
