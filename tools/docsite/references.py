"""Names in docstrings: links where the site has them, code where others have them, warnings where nobody has."""

from __future__ import annotations

import builtins
import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import sowatch

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

__all__ = ["connect", "exists"]


def connect(app: Sphinx) -> None:
    """Has Sphinx ask for each name that it does not find."""
    app.connect("missing-reference", _resolve)


def _resolve(app: Sphinx, env: BuildEnvironment, node: Element, contnode: Element) -> Element | None:
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].strip(".")
    objects = env.domains.python_domain.objects
    ends = [name for name in objects if name == target or name.endswith(f".{target}")]
    documented = {objects[name].node_id: name for name in ends}
    if len(documented) == 1:
        (name,) = documented.values()
        from sphinx.util.nodes import make_refnode

        found = objects[name]
        return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode, name)
    owner = ".".join(filter(None, (node.get("py:module"), node.get("py:class"))))
    return contnode if documented or exists(target, owner) else None


def exists(target: str, owner: str = "") -> bool:
    """Whether a name leads to something: by itself, from the object ``owner`` or where that is defined, in a module."""
    if hasattr(builtins, target.partition(".")[0]) or _find(target) is not None:
        return True
    if any(hasattr(module, target) for module in _modules()):
        return True
    while owner:
        if _find(f"{owner}.{target}") is not None:
            return True
        defined_in = getattr(_find(owner), "__module__", None)
        if defined_in and _find(f"{defined_in}.{target}") is not None:
            return True
        owner = owner.rpartition(".")[0]
    return False


@cache
def _modules() -> tuple[ModuleType, ...]:
    """All that can be imported of sowatch."""
    found = pkgutil.walk_packages(sowatch.__path__, "sowatch.")
    return tuple(import_module(one.name) for one in found if not one.name.rpartition(".")[2].startswith("_"))


def _find(name: str) -> Any:
    """The object of a dotted name, or None."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except (ImportError, ValueError):
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None
