"""The documentation site: what Sphinx makes of docs/, with reference pages made of the code.

A page has a line ``<!-- generated: NAME -->`` where the text of a generator stands in the site:

* ``commands.py``: every command with its options, from the parser.
* ``configuration.py``: every key of the agent's configuration, from the types of its settings.
* ``schema.py``: every line of JSON with its fields, from the schema that ships.
* ``python.py``: what programs import, from the docstrings.
* ``files.py``: pages of the repository's root.

``references.py`` resolves names in docstrings, ``links.py`` checks what was built, ``__main__.py`` does all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from docsite import commands, configuration, files, python, references, schema

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

__all__ = ["GENERATORS", "expanded", "setup"]

#: By name what gives the Markdown of the rest of the marker.
GENERATORS: Final[dict[str, Callable[[str], str]]] = {
    "commands": commands.markdown,
    "configuration": configuration.markdown,
    "schema": schema.markdown,
    "python": python.markdown,
    "file": files.markdown,
}
_MARKER: Final = re.compile(r"^<!-- generated: (?P<name>\w+) ?(?P<words>.*?) ?-->$", re.MULTILINE)


def expanded(text: str) -> str:
    """A page's Markdown with what its markers stand for, and links to pages of the site."""
    return _MARKER.sub(lambda found: GENERATORS[found["name"]](found["words"]), files.linked(text))


def setup(app: Sphinx) -> ExtensionMetadata:
    """What Sphinx calls."""

    def expand(_: Sphinx, __: str, source: list[str]) -> None:
        source[0] = expanded(source[0])

    app.connect("source-read", expand)
    references.connect(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
