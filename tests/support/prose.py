"""What users and operators read: the messages, the help and the public docstrings of ``src``, and the pages.

A message is a string of several words that is no docstring; the parts of an f-string are one message.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["ROOT", "Text", "bpf_comments", "messages", "page_texts", "pages", "public_docstrings"]

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = ROOT / "src" / "sowatch"


class Text(NamedTuple):
    """Where it stands, from the root of the checkout, and what it says."""

    path: str
    line: int
    text: str


def pages() -> Iterator[Text]:
    """Line by line: README and its like, docs without the decisions, news, and what is deployed."""
    found = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")]
    found += [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "decisions"]
    found += (ROOT / "news").glob("*.md")
    found += [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    for path in sorted(found):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield Text(str(path.relative_to(ROOT)), number, line)


def page_texts() -> Iterator[Text]:
    """Of the agent's page: what its code writes in quotes or says in comments, and its HTML."""
    for path in sorted((SOURCES / "agent" / "page" / "assets").iterdir()):
        kinds = {".js": r"\"[^\"\n]* [^\"\n]*\"|`[^`]* [^`]*`|//[^\n]*|/\*.*?\*/", ".html": r"\"[^\"\n]*\"|>[^<]+<"}
        if path.suffix in kinds:
            yield from _found(path, kinds[path.suffix])


def bpf_comments() -> Iterator[Text]:
    """Of the BPF programs, without what is taken over from the kernel and libbpf."""
    for path in sorted((SOURCES / "bpf" / "programs").glob("*.bpf.[ch]")):
        yield from _found(path, r"/\*.*?\*/|//[^\n]*")


def messages() -> Iterator[Text]:
    """Of every module: errors, log lines, help texts, what is written for people."""
    for path, tree in _modules():
        docs = {id(_docstring(node)) for node in ast.walk(tree)}
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = _text_of(node)
            if text is not None and id(node) not in docs | parts and len(text.split()) > 1:
                yield Text(path, node.lineno, text)


def public_docstrings() -> Iterator[Text]:
    """Of modules, and of what has no underscore before its name."""
    for path, tree in _modules():
        for node in ast.walk(tree):
            doc = _docstring(node)
            name = getattr(node, "name", "")
            if doc is not None and (not name.startswith("_") or name.startswith("__")):
                yield Text(path, doc.lineno, str(doc.value))


def _found(path: Path, pattern: str) -> Iterator[Text]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(pattern, text, re.DOTALL):
        yield Text(str(path.relative_to(ROOT)), text.count("\n", 0, found.start()) + 1, found.group())


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def _docstring(node: ast.AST) -> ast.Constant | None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return None
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def _text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(part) or "{}" for part in node.values)
    return None
