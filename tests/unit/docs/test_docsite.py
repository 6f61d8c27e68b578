"""The reference of the site has everything that the code has, and the check of what was built finds what is wrong."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from msgspec import Struct
from msgspec.structs import fields

import sowatch
from docsite import commands, configuration, expanded, files, links, prose, python, references, schema
from sowatch.agent.settings import (
    FleetSettings,
    HttpSettings,
    RuleSettings,
    Settings,
    SinkSettings,
    VulnerabilitySettings,
)
from sowatch.cli._main import COMMANDS, command_parser
from sowatch.model.config import Config

#: Settings that are tables, with pages of their own keys.
TABLES = ("watch", "rules", "sinks", "exporters", "http", "fleet", "vulnerabilities")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_options_in_the_reference(name: str) -> None:
    page = commands.markdown("")
    section = page.partition(f"## sowatch {name}\n")[2].partition("\n## sowatch ")[0]
    for option, action in command_parser(name)[1]._option_string_actions.items():
        assert option in section or action.help == argparse.SUPPRESS


@pytest.mark.parametrize(
    "kind",
    [Settings, Config, RuleSettings, SinkSettings, HttpSettings, FleetSettings, VulnerabilitySettings],
    ids=lambda kind: kind.__name__,
)
def test_a_key_of_the_configuration_is_in_the_reference(kind: type) -> None:
    page = configuration.markdown("")
    known = configuration.meanings(kind)
    for one in fields(kind):
        assert known[one.name]
        if kind is not Settings or one.name not in TABLES:
            assert f"\n`{one.name}` (" in page


def test_every_table_of_the_configuration_is_in_the_reference() -> None:
    hints = [get_type_hints(Settings)[one.name] for one in fields(Settings)]
    kinds = {kind for hint in hints for kind in (hint, *get_args(hint)) if isinstance(kind, type)}
    tables = {kind for kind in kinds if issubclass(kind, Struct)}
    assert len(tables) > 4
    assert tables <= {kind for kind, _, _ in configuration._TABLES}


def test_a_key_has_its_type_its_default_and_when_a_change_takes_effect() -> None:
    page = configuration.markdown("")
    assert '\n`log_level` (one of `debug`, `info`, `warning`, `error`; default `"info"`)\n' in page
    assert "\n`reload` (true or false; default `true`; a change waits for a restart)\n" in page
    assert "\n`allow_procfs_fallback` (true or false; default `false`)\n" in page


def test_every_line_of_the_schema_is_in_the_reference() -> None:
    page = schema.markdown("")
    for event in ("load", "unload", "ready", "lost", "stopped", "mapping", "http", "trace", "explain"):
        assert f"\n### Line {event}\n" in page
    assert "| `cause` | `exec`, `fork`, `mmap`, `repair`, `snapshot` |  |" in page
    assert (
        "| `process` | [process](#value-process) | The process as it was then. What could not be read is null. |"
        in page
    )


def test_everything_public_is_in_the_reference() -> None:
    assert python.undocumented() == []
    named = {name for groups in python.GROUPS.values() for module, names in groups.values() for name in names}
    assert set(sowatch.__all__) <= named


def test_a_public_name_that_no_page_has_fails_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("sowatch.uprobes"), "__all__", ["Attacher", "Newcomer"])
    with pytest.raises(LookupError, match=r"no page has sowatch\.uprobes\.Newcomer"):
        python.markdown("uprobes")


def test_a_marker_becomes_what_its_generator_makes() -> None:
    assert expanded("a\n<!-- generated: python http -->\nb\n").startswith("a\n## Taps\n")
    assert expanded("a\n<!-- a comment -->\n") == "a\n<!-- a comment -->\n"
    with pytest.raises(KeyError):
        expanded("<!-- generated: nothing -->")


def test_text_of_help_is_shown_as_it_stands() -> None:
    assert prose.escaped("a <b> *c* `d*e` f_g") == r"a \<b\> \*c\* `d*e` f\_g"
    assert prose.paragraphs("one\ntwo\n\nList:\n  a  b\n\n  c\nafter") == (
        "one two\n\nList:\n\n```text\na  b\n\nc\n```\n\nafter"
    )


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("Watcher", "sowatch"),
        ("start", "sowatch.Watcher"),
        ("NO_GUARD", "sowatch.Config"),
        ("collections.abc.Callable", "sowatch"),
        ("int", ""),
        ("sowatch.uprobes.attacher.Attacher", ""),
    ],
)
def test_a_name_in_a_docstring_that_leads_somewhere_exists(name: str, owner: str) -> None:
    assert references.exists(name, owner)


@pytest.mark.parametrize("name", ["Watchr", "Watcher.begin", "sowatch.nothing", "uprobes.Attachr"])
def test_a_name_that_leads_nowhere_does_not(name: str) -> None:
    assert not references.exists(name, "sowatch")


def test_every_page_is_in_the_table_of_contents() -> None:
    docs = files.ROOT / "docs"
    listed = set((docs / "index.md").read_text(encoding="utf-8").splitlines())
    pages = {str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md")}
    assert {page for page in pages - listed if not page.startswith("decisions/0")} == {"index"}


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("[a](../ARCHITECTURE.md#packages)", "[a](architecture.md#packages)"),
        ("[a](../../SECURITY.md)", "[a](../security.md)"),
        ("[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("[a](../http.md)", "[a](../http.md)"),
    ],
)
def test_a_link_to_a_page_of_the_root_leads_to_its_page_in_the_site(text: str, link: str) -> None:
    assert expanded(text) == link


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "style.css").write_text("a { background: url(data:image/png;base64,AA) }", encoding="utf-8")
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>', encoding="utf-8")
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="style.css"><link rel="canonical" href="https://example.org/a">'
        '<a href="b.html#here">b</a> <a href="#">top</a> <a href="https://example.org/">far</a>',
        encoding="utf-8",
    )
    return tmp_path


def test_a_site_whose_links_lead_somewhere_has_no_problem(site: Path) -> None:
    assert links.problems(site) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('<a href="c.html">', "1: c.html leads to no file"),
        ('\n<a href="b.html#there">', "2: b.html#there leads to no place on that page"),
        ('<a href="#there">', "1: #there leads to no place on that page"),
        ('<script src="https://example.org/x.js">', "1: fetches https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "1: fetches //example.org/x.css"),
        ('<img src="missing.png">', "1: missing.png leads to no file"),
    ],
)
def test_a_link_that_is_wrong_is_found(text: str, said: str, site: Path) -> None:
    (site / "c_.html").write_text(text, encoding="utf-8")
    assert links.problems(site) == [f"c_.html:{said}"]


@pytest.mark.parametrize("text", ['@import "https://example.org/x.css";', "a { src: url(//example.org/font.woff) }"])
def test_a_style_that_fetches_from_elsewhere_is_found(text: str, site: Path) -> None:
    (site / "style.css").write_text(text, encoding="utf-8")
    (found,) = links.problems(site)
    assert found.startswith("style.css: fetches ")
