"""Who has which file: activation once, deactivation once, and a blocklist.

May import ``errors``, ``identity``, ``events``, ``procfs`` and ``config``.

* ``files.py``: `FileRegistry`, which runs the callbacks.
* ``holdings.py``: who holds what.
* ``blocklist.py``: the files whose activation failed.
* ``liveness.py``: whether a process is still there.
* ``records.py``: what it tells of itself.
"""

from sowatch.registry.files import FileRegistry
from sowatch.registry.liveness import process_is_alive, running_stat
from sowatch.registry.records import BlockedFile, FileCallback, FileState, RegisteredFile, RegistryStats

__all__ = [
    "BlockedFile",
    "FileCallback",
    "FileRegistry",
    "FileState",
    "RegisteredFile",
    "RegistryStats",
    "process_is_alive",
    "running_stat",
]
