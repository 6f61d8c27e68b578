"""Who has which file: activation once, deactivation once, and a blocklist.

* ``files.py``: `FileRegistry`, which runs the callbacks.
* ``holdings.py``: who holds what.
* ``blocklist.py``: the files whose activation failed.
* ``records.py``: what it reports of itself.
"""

from sowatch.engine.activation.files import FileRegistry
from sowatch.engine.activation.records import BlockedFile, FileCallback, FileState, RegisteredFile, RegistryStats

__all__ = [
    "BlockedFile",
    "FileCallback",
    "FileRegistry",
    "FileState",
    "RegisteredFile",
    "RegistryStats",
]
