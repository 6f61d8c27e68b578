"""How an explanation is shown, and the command line."""

from __future__ import annotations

import os
import re
import threading

import pytest
from msgspec.structs import replace

from sowatch import cli
from sowatch.cli import explain as command
from sowatch.cli._agent import explanation_of
from sowatch.cli._client import Agent
from sowatch.engine.activation import BlockedFile, RegisteredFile
from sowatch.explain import FileLook, PathReport, ProcessReport, Try, explanation, to_dict
from sowatch.explain.assemble import PathFacts
from sowatch.explain.audit import Difference
from sowatch.explain.gather import explain
from sowatch.explain.mapped import Shown
from sowatch.linux.proc import Miss
from sowatch.linux.proc_parse import executable_maps
from sowatch.model import wire_explain
from sowatch.model.encoding import dumps, restore
from sowatch.model.events import Library
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule, RuleSet
from support import strict
from support.explained import HERE, NOTES, NOW_NS, UNTOLD, Case, known_file, mapped_in, path_of, row, verdict
from support.printed import VALIDATOR
from support.records import File

# ---- how it is shown ----------------------------------------------------------------------------

NASTY = "/tmp/lib\x1b[31m\n\u202e\udcff.so"


def nasty(case: Case) -> Case:
    case.process = replace(case.process, comm="a\x1b]0;b", exe=NASTY, cgroup=NASTY, container=NASTY, ns_pid=3)
    case.rows = [row(NASTY)]
    case.files = [known_file(File(NASTY), rule=None)]
    case.look = FileLook("gone", NASTY, None, (Try("root", NASTY, "its name is gone"),), None, NASTY)
    case.rules = RuleSet([Rule(None, name=NASTY, exports=(NASTY,))])
    case.blocked = [BlockedFile(NASTY, FileId(254, 0, 100, 1), NASTY, NASTY, 900.0, 1600.0, NOW_NS)]
    library = Library(NASTY, FileId(254, 0, 100, 1))
    case.registered = [RegisteredFile(NASTY, library, "attached", frozenset(), 0.0, NOW_NS)]
    case.differences = [Difference("extra", 10, NASTY, 1, 0x1000, 0x9000)]
    return case


def shown(report: ProcessReport | PathReport) -> list[str]:
    """As people see it; what an agent has sent is shown the same."""
    sent = strict.loads(dumps(explanation(report)).encode())
    VALIDATOR.validate(sent)
    lines = _lines(explanation(report))
    assert _lines(explanation_of(Agent("/no/agent"), restore(sent))) == lines
    return lines


def _lines(found: wire_explain.ProcessReport | wire_explain.PathReport | wire_explain.RuleReport) -> list[str]:
    if found.target == "process":
        return list(command._process(found))
    assert found.target == "path"
    return list(command._path(found))


def test_names_that_others_chose_are_escaped_in_the_text_of_a_process(case: Case) -> None:
    text = "\n".join(shown(nasty(case).report()))
    assert "/tmp/lib\\x1b[31m\\n\\u202e\\xff.so" in text
    assert text.replace("\n", "").isprintable()


def test_names_that_others_chose_are_escaped_in_the_text_of_a_path(case: Case) -> None:
    facts = PathFacts(NASTY, f"/x{NASTY}", "regular file", None, Shown(254, 0, 100))
    report = path_of(nasty(case), facts, [mapped_in("deleted", path=NASTY, process=case.process)], case.look)
    text = "\n".join(shown(report))
    assert "/tmp/lib\\x1b[31m\\n\\u202e\\xff.so" in text
    assert text.replace("\n", "").isprintable()


def test_every_word_has_a_sentence(case: Case) -> None:
    for change in [*NOTES, *UNTOLD]:
        one = Case()
        change(one)
        for as_look in command._ELF:
            one.look = FileLook(as_look)  # type: ignore[arg-type]
            assert shown(one.report())
    for relation in command._RELATION:
        assert shown(path_of(case, mapped=[mapped_in(relation)]))
    facts = replace(HERE, file_type="directory")
    assert shown(path_of(case, facts, look=FileLook("not_regular")))


def test_the_text_of_a_process_names_the_rule_the_verdict_and_the_way(case: Case) -> None:
    case.exact = {case.files[0].name.key: verdict(b"", True, None)}  # type: ignore[dict-item]
    lines = shown(case.report())
    clock = r"start      \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z, 0\.010000077 s after boot"
    assert re.fullmatch(clock, lines.pop(1))
    assert lines == [
        "process    10 nginx",
        "exe        /usr/sbin/nginx",
        "cgroup     -",
        "state      running, 1 thread, 64-bit, leader alive",
        "kernel     tracks it: activity generation 1, 1 range known, no rescan is needed",
        "map        knows it since 2023-11-14T22:13:19.999999Z, 1 file",
        "",
        "/usr/lib/libssl.so.3",
        "  ranges   1000-2000",
        "  file     254:0/100.1 by the map; to this process: library",
        "  seen     mmap at 2023-11-14T22:13:19.999999Z",
        "  rule     all wants it",
        "  verdict  match: the kernel side reports it",
        "  open     yes, by map_files: /proc/10/map_files/1-2",
        "  elf      an ELF file, build id aa, soname libssl.so.3",
    ]


def test_the_object_of_a_process_has_every_part(case: Case) -> None:
    found = strict.loads(dumps(to_dict(nasty(case).report())))
    assert list(found) == [
        *("schema", "event", "target", "process", "state", "threads", "leader_alive", "bits"),
        *("kernel", "map", "mappings", "extra", "withheld", "notes", "http", "started", "seq"),
    ]
    assert (found["schema"], found["event"], found["target"], found["bits"]) == (1, "explain", "process", 64)
    assert found["kernel"] == {
        "followed": True,
        "touches": 1,
        "range_count": 1,
        "ranges": [["1000", "2000"]],
        "dirty": False,
        "shares_vm": False,
    }
    assert found["map"]["since"] == "2023-11-14T22:13:19.999999Z"
    (one,) = found["mappings"]
    assert list(one) == [
        *("library", "id_from", "ranges", "seen", "rule", "rules", "untold", "verdict", "file"),
        *("activations", "blocked", "differences", "unprobed", "attachments"),
    ]
    assert one["library"]["path"] == NASTY
    assert one["blocked"][0]["seconds_left"] == 600.0
    assert one["file"]["tries"] == [{"by": "root", "path": NASTY, "error": "its name is gone"}]
    assert found["extra"][0]["range"] == ["1000", "9000"]


def test_the_object_of_a_process_that_is_not_known_has_nulls(case: Case) -> None:
    case.is_known, case.followed, case.is_32bit = False, None, Miss.DENIED
    found = to_dict(case.report())
    assert (found["kernel"], found["map"], found["bits"]) == (None, None, None)
    assert found["mappings"][0]["seen"] is None


def test_the_object_of_a_path_has_every_part(case: Case) -> None:
    found = strict.loads(dumps(to_dict(path_of(case, mapped=[mapped_in("same")]))))
    assert list(found) == [
        *("schema", "event", "target", "path", "resolved", "type", "error", "ids", "kind", "rule", "rules"),
        *("verdict", "file", "activations", "blocked", "attachments", "mapped", "notes", "seq"),
    ]
    assert found["ids"] == [{"dev": "254:0", "inode": 100, "generation": 1, "subvol": 0, "id_from": "map"}]
    assert found["mapped"][0]["relation"] == "same"
    assert found["mapped"][0]["process"]["pid"] == 10


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "give one PID or PATH"),
        (["1", "2"], 2, "give one PID or PATH"),
        (["--rule", "(", "1"], 2, "bad pattern"),
        (["--kind", "cow", "1"], 2, "unknown kind"),
        (["--strategy", "cow", "1"], 2, "unknown strategy"),
        (["--proc-root", "/", "1"], 2, "not a proc file system"),
        (["--json", "--format", "text", "1"], 2, "contradict"),
        (["0"], 1, "there is no process 0"),
        ([str((1 << 22) - 1)], 1, "there is no process 4194303"),
        (["9" * 5000], 1, "there is no process 999"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_a_question_that_cannot_be_answered_is_one_line(
    words: list[str], code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", *words]) == code
    stdout, stderr = capfd.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert said in stderr


def test_a_thread_is_sent_to_its_process(capfd: pytest.CaptureFixture[str], dam: threading.Event) -> None:
    thread = threading.Thread(target=dam.wait)
    thread.start()
    assert cli.main(["explain", str(thread.native_id)]) == 2
    assert f"is a thread of process {os.getpid()}. Give {os.getpid()}." in capfd.readouterr().err
    dam.set()
    thread.join()


@pytest.mark.parametrize(("text", "pid"), [("123", 123), ("0123", 123), ("./123", None), ("/123", None), ("٣", None)])
def test_only_digits_are_a_process(text: str, pid: int | None) -> None:
    assert command._pid(text, "/proc") == pid


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_wrong_usage(path: str) -> None:
    with pytest.raises(command.UsageError):
        explain(path, None)  # type: ignore[arg-type]


def test_the_rows_here_are_what_proc_gives() -> None:
    data = b"00001000-00002000 r-xp 00000000 fe:00 100                        /usr/lib/libssl.so.3\n"
    assert executable_maps(data) == [row()]
