"""Which package owns a file. Read-only.

A process names its libraries inside its own root, which a container controls; see `package_databases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sowatch.inventory.package_databases import apk_listed, dpkg_listed
from sowatch.inventory.roots import RootKey, Roots, own_root_key
from sowatch.inventory.rpm_database import rpm_owners

__all__ = ["owners"]


def owners(roots: Roots, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str | None]:
    """The packages that own files, as their package manager names them.

    dpkg's and apk's databases are read in whatever root the process has, each once; ``rpm`` is
    asked about our own root only, because it runs macros, which a container could have written.

    Args:
        roots: knows the root directories.
        wanted: ``(pid, path)``, the path as that process sees it.

    Returns:
        The owner of each; ``None`` if no package has it or the process is gone.
    """
    asked = list(dict.fromkeys(wanted))
    by_root: dict[RootKey, list[tuple[int, str]]] = {}
    for pid, path in asked:
        key = roots.key(pid)
        if key is not None:
            by_root.setdefault(key, []).append((pid, path))
    found: dict[tuple[int, str], str | None] = dict.fromkeys(asked)
    for key, group in by_root.items():
        paths = list(dict.fromkeys(path for _, path in group))
        for pid in dict.fromkeys(pid for pid, _ in group):
            try:
                with roots.open(pid) as root_fd:
                    by_path = _owners_below(root_fd, paths, is_own_root=key == own_root_key())
            except OSError:  # this one ended just now; another has the same root
                continue
            found |= {(pid, path): by_path[path] for pid, path in group}
            break
    return found


def _owners_below(root_fd: int, paths: Sequence[str], *, is_own_root: bool) -> dict[str, str | None]:
    listed = dpkg_listed(root_fd, paths)
    listed |= apk_listed(root_fd, [path for path in paths if listed[path] is None])
    found = {path: None if one is None else one.package for path, one in listed.items()}
    left = [path for path in paths if found[path] is None]
    if left and is_own_root:
        found |= rpm_owners(left)
    return found
