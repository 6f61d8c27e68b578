"""`sowatch list`: the snapshot as lines and tables, and what of it is stale. Stale files are real ones."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

# The module, not the attribute of the package: `import sowatch.cli.list as ...` is the same.
from sowatch.cli import list as list_command
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli._schema import load_schema
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import LoadAttempt, NotPermitted, PatternError, SowatchError, UsageError
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.lines import stamp
from sowatch.model.literals import ONE_SCAN
from support import strict
from support.programs import Mapper
from support.scripted import PROCESS, READY, SSL, Entry, ScriptedWatcher

VALIDATOR = jsonschema.Draft202012Validator(load_schema(strict=True))

#: A pid that no process has: its entries are never looked up on disk.
NOBODY = (1 << 22) - 1
NGINX = replace(PROCESS, pid=NOBODY)
CURL = Process(pid=NOBODY - 1, start_ns=1, comm="c\turl", container=None)
ZLIB = Library(path="/usr/lib/libz.so.1", id=FileId(254, 0, 100))


class Listed:
    def __init__(self, code: int, text: str, warnings: list[str]) -> None:
        self.code, self.text, self.warnings = code, text, warnings

    def lines(self) -> list[dict[str, Any]]:
        found = [strict.loads(line) for line in self.text.splitlines()]
        for line in found:
            VALIDATOR.validate(line)
        assert [line["seq"] for line in found] == list(range(1, len(found) + 1))
        assert found[0]["event"] == "head"
        return found[1:]

    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.text.splitlines()]


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., Listed]:
    def run(watcher: ScriptedWatcher | Sequence[Entry], *words: str) -> Listed:
        if not isinstance(watcher, ScriptedWatcher):
            watcher = ScriptedWatcher(entries=watcher)
        parser = Parser(prog="sowatch list", description=None)
        list_command.configure(parser)
        warnings: list[str] = []
        with (tmp_path / "out").open("w+", encoding="utf-8") as file:
            code = list_command.run(
                parser.parse_words(words), out=Out(file.fileno()), warn=warnings.append, open_watcher=watcher.open
            )
            file.seek(0)
            text = file.read()
        assert watcher.is_stopped.is_set()
        return Listed(code, text, warnings)

    return run


def test_json_is_one_mapping_a_line_ordered_by_library(listed: Any) -> None:
    done = listed([Entry(CURL, ZLIB, rule="z"), Entry(NGINX), Entry(CURL)], "--json")
    lines = done.lines()

    assert done.code == 0
    assert [line["event"] for line in lines] == ["mapping"] * 3
    assert [line["seq"] for line in lines] == [2, 3, 4]
    assert [(line["library"]["path"], line["process"]["pid"]) for line in lines] == [
        ("/usr/lib/libssl.so.3", NOBODY - 1),
        ("/usr/lib/libssl.so.3", NOBODY),
        ("/usr/lib/libz.so.1", NOBODY - 1),
    ]
    assert lines[2]["rule"] == "z"
    assert lines[0]["ranges"] == [["1000", "2000"]]
    assert "package" not in lines[0]


def test_json_by_process_is_the_same_lines_ordered_by_process(listed: Any) -> None:
    lines = listed([Entry(CURL, ZLIB), Entry(NGINX), Entry(CURL)], "--by", "process", "--json").lines()

    assert [(line["process"]["pid"], line["library"]["path"]) for line in lines] == [
        (NOBODY - 1, "/usr/lib/libssl.so.3"),
        (NOBODY - 1, "/usr/lib/libz.so.1"),
        (NOBODY, "/usr/lib/libssl.so.3"),
    ]


def test_the_table_by_library_counts_the_processes_of_each_file(listed: Any) -> None:
    done = listed([Entry(CURL, ZLIB), Entry(NGINX), Entry(CURL)])

    assert done.text == (
        "PROCESSES  CONTAINERS  KIND     BUILD ID      STALE  PATH\n"
        "        2           1  library  00ff00ff00ff  -      /usr/lib/libssl.so.3\n"
        "        1           0  library  -             -      /usr/lib/libz.so.1\n"
    )


def test_two_files_of_one_path_are_two_rows(listed: Any) -> None:
    other = replace(SSL, id=FileId(254, 0, 5))
    third = replace(SSL, id=FileId(254, 1, 5))
    found = listed([Entry(NGINX), Entry(CURL, other), Entry(replace(CURL, pid=7), third)], "--format", "table")

    assert [line.partition("/usr")[2] for line in found.text.splitlines()[1:]] == [
        "/lib/libssl.so.3 (device 254:0, inode 5)",
        "/lib/libssl.so.3 (in 3f2a9c8b1d0e)",
        "/lib/libssl.so.3 (device 254:1, inode 5)",
    ]


def test_with_a_pattern_who_has_a_file_stands_below_it(listed: Any) -> None:
    worker = replace(NGINX, pid=7)
    root = Process(8, 1, comm="sshd", uid=0, cgroup="/system.slice/ssh.service")

    done = listed([Entry(NGINX), Entry(root), Entry(worker), Entry(root, ZLIB)], "lib")

    assert done.text == (
        "PROCESSES  CONTAINERS  KIND     BUILD ID      STALE  PATH\n"
        "  COMM   USER      UNIT OR CONTAINER  PIDS\n"
        "        3           1  library  00ff00ff00ff  -      /usr/lib/libssl.so.3\n"
        "  nginx  www-data  nginx.service      7,4194303\n"
        "  sshd   root      ssh.service        8\n"
        "        1           0  library  -             -      /usr/lib/libz.so.1\n"
        "  sshd   root      ssh.service        8\n"
    )


def test_the_table_by_process_has_a_row_for_each_mapping(listed: Any) -> None:
    done = listed([Entry(NGINX), Entry(CURL, ZLIB)], "--by", "process")

    assert done.text == (
        "    PID  COMM    CONTAINER     KIND     STALE  PATH\n"
        "4194302  c\\turl  -             library  -      /usr/lib/libz.so.1\n"
        "4194303  nginx   3f2a9c8b1d0e  library  -      /usr/lib/libssl.so.3\n"
    )


def test_an_empty_list_is_the_head_in_json_and_a_table_without_rows(listed: Any) -> None:
    assert listed([], "--json").lines() == []
    assert listed([]).text == "PROCESSES  CONTAINERS  KIND  BUILD ID  STALE  PATH\n"


@pytest.mark.parametrize(
    ("guarantee", "words", "source"),
    [(ONE_SCAN, [], "scan"), ("exact", [], "watch"), (ONE_SCAN, ["--duration", "0"], "watch")],
)
def test_the_head_says_which_host_that_is_and_how_and_when_it_was_scanned(
    listed: Any, guarantee: str, words: list[str], source: str
) -> None:
    watcher = ScriptedWatcher(entries=[])
    ready = replace(READY, guarantee=guarantee, host_id="0123456789abcdef0123456789abcdef", version="1.2.3")
    watcher.start = lambda: ready  # type: ignore[method-assign]

    assert strict.loads(listed(watcher, "--json", *words).text) == {
        "schema": 1,
        "event": "head",
        "seq": 1,
        "time": stamp(READY.time_ns),
        "host": "box",
        "host_id": "0123456789abcdef0123456789abcdef",
        "boot_id": "5d2a",
        "version": "1.2.3",
        "source": source,
        "strategy": "core",
        "guarantee": guarantee,
        "hooks": "syscall",
        "limits": ["32-bit processes are watched by reads"],
        "seconds": 0.03,
    }


def test_a_duration_is_waited_for_before_the_list_is_taken(listed: Any) -> None:
    waited: list[float | None] = []
    watcher = ScriptedWatcher(entries=[Entry(NGINX)])
    watcher.wait = lambda timeout_s=None: bool(waited.append(timeout_s))  # type: ignore[method-assign]

    assert len(listed(watcher, "--duration", "2.5", "--json").lines()) == 1
    assert waited == [2.5]


def test_the_watcher_is_stopped_if_it_cannot_start(listed: Any) -> None:
    watcher = ScriptedWatcher(start_error=NotPermitted("what", "missing", "Do this."))

    with pytest.raises(NotPermitted):
        listed(watcher)
    assert watcher.is_stopped.is_set()


def test_a_weaker_strategy_is_said_on_stderr(listed: Any) -> None:
    ready = replace(
        READY, strategy="procfs", guarantee="sampled", attempts=(LoadAttempt("core", ok=False, error="no BTF"),)
    )

    (line,) = listed(ScriptedWatcher(ready=ready)).warnings
    assert line == (
        "watching with procfs (sampled) because core: no BTF. Limits: 32-bit processes are watched by reads. "
        "See `sowatch doctor`."
    )


# --- stale --------------------------------------------------------------------------------------


@pytest.fixture
def mapper(programs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapper]:
    with Mapper(programs["mapper"], tmp_path_factory.mktemp("s")) as running:
        yield running


def entries_of(pid: int) -> list[Entry]:
    """What a watcher would list of a real process, read from its maps."""
    proc = ProcFs()
    rows, stats = proc.executable_maps(pid), proc.stat(pid)
    assert isinstance(rows, list)
    assert stats
    process = Process(pid, stats.start_ns, comm="mapper", cgroup="/system.slice/old.service")
    return [
        Entry(
            process,
            Library(os.fsdecode(row.path), FileId(row.major, row.minor, row.inode), deleted=row.is_deleted),
            ranges=((row.start, row.end),),
        )
        for row in rows
        if row.inode
    ]


def test_only_what_is_gone_or_replaced_on_disk_is_stale(listed: Any, mapper: Mapper, make_library: Any) -> None:
    kept, gone, replaced = (make_library(name) for name in ("libkept.so", "libgone.so", "libreplaced.so"))
    for library in (kept, gone, replaced):
        mapper.map(library)
    mapper.emit("memfd", "libjit.so", kept)
    gone.unlink()
    make_library("libreplaced.so.new").rename(replaced)

    lines = listed(entries_of(mapper.pid), "--stale", "--json").lines()

    assert [(line["library"]["path"], line["stale"]) for line in lines] == [
        (str(gone), "deleted"),
        (str(replaced), "replaced"),
    ]
    assert [(line["package"], line["unit"]) for line in lines] == [(None, "old.service")] * 2


def test_the_whole_list_says_what_is_stale_too(listed: Any, mapper: Mapper, make_library: Any) -> None:
    gone = make_library("libgone.so")
    mapper.map(gone)
    gone.unlink()

    found = {line["library"]["path"]: line["stale"] for line in listed(entries_of(mapper.pid), "--json").lines()}

    assert found.pop(str(gone)) == "deleted"
    assert set(found.values()) == {None}


def test_stale_files_stand_below_the_unit_and_the_command_that_restarts_it(
    listed: Any, mapper: Mapper, make_library: Any
) -> None:
    gone, replaced = make_library("libgone.so"), make_library("libreplaced.so")
    mapper.map(gone)
    mapper.map(replaced)
    gone.unlink()
    make_library("new/libreplaced.so").rename(replaced)

    done = listed(entries_of(mapper.pid), "--stale")

    pid = str(mapper.pid)
    assert done.text == (
        "UNIT OR CONTAINER  PROCESSES  RESTART\n"
        f"  {'PID':>{len(pid)}}  COMM    STALE     PACKAGE  PATH\n"
        "old.service                1  systemctl restart old.service\n"
        f"  {pid}  mapper  deleted   -        {gone}\n"
        f"  {pid}  mapper  replaced  -        {replaced} (an identical build)\n"
    )
    assert done.code == 0


def test_a_plan_is_the_commands_and_a_check_is_an_exit_code(listed: Any, mapper: Mapper, make_library: Any) -> None:
    gone = make_library("libgone.so")
    mapper.map(gone)
    entries = entries_of(mapper.pid)
    quiet = listed(entries, "--stale", "--check")
    gone.unlink()

    assert (quiet.code, quiet.text, quiet.warnings[1:]) == (0, "", [])
    found = listed(entries, "--stale", "--check")
    assert (found.code, found.text) == (1, listed(entries, "--stale").text)
    planned = listed(entries, "--stale", "--plan", "--check")
    *comments, command = planned.text.splitlines()
    assert (planned.code, command) == (1, "systemctl restart old.service")
    assert comments == [f"# old.service: 1 process (mapper, {mapper.pid}); still runs libgone.so"]
    (line,) = listed(entries, "--stale", "--json").lines()
    assert (line["restart"], line["restart_advice"]) == ("systemctl restart old.service", None)


def test_a_check_that_could_not_read_all_is_neither_nothing_nor_something(listed: Any) -> None:
    watcher = ScriptedWatcher(entries=[Entry(NGINX)])
    watcher.unread = {7: 1.5}  # type: ignore[attr-defined]
    ours = ProcFs().stat(os.getpid())
    assert ours
    unknown = Entry(Process(os.getpid(), ours.start_ns), Library("/no/such/file.so", FileId(254, 0, 1)))

    assert listed(watcher, "--stale", "--check").code == 3
    assert listed([unknown], "--stale", "--check").code == 3


@pytest.mark.parametrize(
    "words", [["--check"], ["--plan"], ["--stale", "--plan", "--format", "csv"], ["--json", "-o", "pid"]]
)
def test_options_that_contradict_each_other_are_refused_with_what_to_do(listed: Any, words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"Write|Leave"):
        listed([], *words)


# --- filters, columns, CSV ----------------------------------------------------------------------

SSHD = Process(8, 1, comm="sshd", exe="/usr/sbin/sshd", uid=0, cgroup="/system.slice/system-ssh.slice/ssh@1.service")


@pytest.mark.parametrize(
    ("words", "pids"),
    [
        (["--comm", "ssh"], [8]),
        (["--comm", "!ssh"], [NOBODY]),
        (["--comm", "ssh,nginx"], [8, NOBODY]),
        (["--comm", "ssh", "--comm", "^nginx$"], [8, NOBODY]),
        (["--comm", "!ssh,!nginx"], []),
        (["--comm", "[n,s]{1,2}(g|s)"], [8, NOBODY]),
        (["--unit", "ssh"], [8]),
        (["--unit", "!nginx.service"], [8]),
        (["--user", "root"], [8]),
        (["--user", "33"], [NOBODY]),
        (["--user", "!root"], [NOBODY]),
        (["--exe", "sbin/nginx$"], [NOBODY]),
        (["--cgroup", "/system-ssh"], [8]),
        (["--build-id", "00FF00"], [8, NOBODY]),
        (["--build-id", "!00ff"], []),
        (["--comm", "nginx", "--user", "root"], []),
    ],
)
def test_filters_choose_processes_and_files(listed: Any, words: list[str], pids: list[int]) -> None:
    done = listed([Entry(NGINX), Entry(SSHD)], *words, "--json")

    assert sorted(line["process"]["pid"] for line in done.lines()) == sorted(pids)


def test_files_are_chosen_by_a_file_of_build_ids(listed: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text(f"# CVE-2026-1\n\n{'00FF' * 10} libssl3\nabcdef\n")
    entries = [Entry(NGINX), Entry(NGINX, ZLIB)]

    done = listed(entries, "--match-build-ids", str(bad), "-o", "path,processes", "--no-headers")

    assert done.rows() == [["/usr/lib/libssl.so.3", "1"]]
    bad.write_text("libssl3\n")
    with pytest.raises(UsageError, match=r"line 1: 'libssl3' is no build id"):
        listed(entries, "--match-build-ids", str(bad))


def test_what_exports_a_symbol_is_left_to_rules_and_what_is_left_out_to_rules_before_them(listed: Any) -> None:
    watcher = ScriptedWatcher(
        entries=[Entry(NGINX), Entry(SSHD, rule="left out: SSL_write ssl"), Entry(CURL, rule="ssl")]
    )

    done = listed(watcher, "ssl", "--exports", "SSL_read,!SSL_write", "--json")

    assert [line["process"]["pid"] for line in done.lines()] == [CURL.pid, NOBODY]
    assert [(rule.name, rule.pattern, set(rule.exports)) for rule in watcher.selection.rules] == [
        ("left out: SSL_write ssl", "ssl", {"SSL_write"}),
        ("ssl", "ssl", {"SSL_read"}),
    ]


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["--comm", "("], PatternError, "bad pattern '('"),
        (["--comm", "a{99999999999}"], PatternError, "too large or too deeply nested"),
        (["--unit", "(" * 500 + ")" * 500], PatternError, "too large or too deeply nested"),
        (["--user", "1" * 5000], SowatchError, "on this host. Give the uid."),
        (["--comm", "a,,b"], UsageError, "'a,,b' has an empty word in it"),
        (["--user", "nosuchuser"], SowatchError, "there is no user 'nosuchuser' on this host. Give the uid."),
        (["--build-id", "xyz"], UsageError, "'xyz' is no build id"),
        (["--match-build-ids", "/no/such"], SowatchError, "cannot read '/no/such': No such file or directory."),
        (["-o", "pids"], UsageError, "unknown column 'pids'. Did you mean pid?"),
        (["--by", "host"], UsageError, "unknown --by 'host'"),
    ],
)
def test_a_filter_or_column_that_cannot_be_is_refused(
    listed: Any, words: list[str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        listed([], *words)


def test_a_container_that_there_is_not_is_an_error(listed: Any) -> None:
    with pytest.raises(SowatchError, match=r"no container whose id begins with 'nosuch' .*--by container") as error:
        listed([], "--container", "nosuch")
    assert error.value.exit_code == 1


def test_there_is_a_row_for_each_combination_of_the_chosen_columns(listed: Any) -> None:
    entries = [Entry(NGINX), Entry(replace(NGINX, pid=7)), Entry(NGINX, ZLIB), Entry(SSHD)]

    assert listed(entries, "-o", "comm,files", "-o", "processes,containers").text == (
        "COMM   FILES  PROCESSES  CONTAINERS\n"
        "nginx      2          2           1\n"
        "sshd       1          1           0\n"
    )
    assert listed(entries, "--by", "unit").text == (
        "UNIT           CONTAINER     PROCESSES  FILES\n"
        "nginx.service  3f2a9c8b1d0e          2      2\n"
        "ssh@1.service  -                     1      1\n"
    )


def test_csv_has_names_of_columns_and_quotes_what_needs_it(listed: Any) -> None:
    odd = replace(ZLIB, path='/opt/a,"b"\n.so')

    text = listed([Entry(SSHD, odd), Entry(NGINX)], "--format", "csv", "--by", "process").text

    assert text == (
        "pid,comm,container,kind,stale,path\n"
        '8,sshd,,library,,"/opt/a,""b""\\n.so"\n'
        f"{NOBODY},nginx,3f2a9c8b1d0e4455,library,,/usr/lib/libssl.so.3\n"
    )
    assert next(csv.DictReader(io.StringIO(text)))["path"] == '/opt/a,"b"\\n.so'


def test_the_table_of_stale_files_by_process_names_package_and_unit(
    listed: Any, mapper: Mapper, make_library: Any
) -> None:
    gone = make_library("libgone.so")
    mapper.map(gone)
    gone.unlink()

    rows = listed(entries_of(mapper.pid), "--stale", "--by", "process").rows()

    assert rows == [
        ["PID", "COMM", "STALE", "PACKAGE", "UNIT", "CONTAINER", "PATH"],
        [str(mapper.pid), "mapper", "deleted", "-", "old.service", "-", str(gone)],
    ]


@pytest.mark.parametrize(
    ("cgroup", "shown", "parts"),
    [
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/dbus.service",
            "dbus.service (user@1000.service)",
            ("dbus.service", "user@1000.service", 1000),
        ),
        (
            "/user.slice/user-7.slice/user@7.service/init.scope",
            "init.scope (user@7.service)",
            ("init.scope", "user@7.service", 7),
        ),
        ("/init.scope", "init.scope", ("init.scope", None, None)),
        (
            "/system.slice/docker-1.scope/system.slice/dbus.service",
            "dbus.service (docker-1.scope)",
            ("dbus.service", "docker-1.scope", None),
        ),
        (r"/system.slice/a\x2db.service", r"a\x2db.service", (r"a\x2db.service", None, None)),
        ("/system.slice/\x1b[2J.service", r"\x1b[2J.service", ("\x1b[2J.service", None, None)),
        ("/kubepods", "-", (None, None, None)),
    ],
)
def test_a_unit_of_another_manager_is_shown_with_it_and_no_backslash_is_doubled(
    listed: Any, mapper: Mapper, make_library: Any, cgroup: str, shown: str, parts: tuple[str | None, ...]
) -> None:
    gone = make_library("libgone.so")
    mapper.map(gone)
    gone.unlink()
    entries = [replace(one, process=replace(one.process, cgroup=cgroup)) for one in entries_of(mapper.pid)]

    _, row = listed(entries, "--stale", "--by", "process").text.splitlines()
    (line,) = listed(entries, "--stale", "--json").lines()

    assert f"  {shown}  " in row
    assert (line["unit"], line["unit_manager"], line["unit_uid"]) == parts


def test_the_package_is_found_in_the_root_of_the_process(
    listed: Any, spawn: Any, make_library: Any, tmp_path: Path
) -> None:
    jail = tmp_path / "jail"
    library = make_library("jail/usr/lib/libjailed.so")
    info = jail / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (info / "libjailed1:amd64.list").write_text("/usr/lib/libjailed.so\n")
    code = (
        "import ctypes, os, sys\n"
        "if os.geteuid(): ctypes.CDLL(None).unshare(0x10000000)\n"
        "ctypes.CDLL(sys.argv[2]); os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()\n"
    )
    process = spawn(["/usr/bin/python3", "-c", code, jail, library], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"\n"
    [entry] = [entry for entry in entries_of(process.pid) if entry.library.path == str(library)]
    library.unlink()
    seen = replace(entry, library=replace(entry.library, path="/usr/lib/libjailed.so", deleted=True))

    [line] = listed([seen], "--stale", "--json").lines()

    assert (line["stale"], line["package"]) == ("deleted", "libjailed1:amd64")


def test_a_host_without_stale_files_is_told_so_on_stderr(listed: Any) -> None:
    done = listed([Entry(NGINX)], "--stale", "--format", "table")

    assert done.warnings == ["nothing runs on deleted or replaced files."]
    assert len(done.rows()) == 2


# --- what could not be read ---------------------------------------------------------------------


def test_processes_that_hang_leave_the_answer_open_and_are_counted(listed: Any) -> None:
    watcher = ScriptedWatcher(entries=[Entry(NGINX)])
    watcher.unread = {7: 1.5, 8: 0.5}  # type: ignore[attr-defined]

    done = listed(watcher, "--stale", "--json")

    assert done.code == 3
    assert done.lines() == [
        {
            "schema": 1,
            "event": "coverage",
            "seq": 2,
            "processes": {"read": 0, "unreadable": 2, "hidden": False},
            "readable": {"read": 0, "unreadable": 2, "hidden": False},
        }
    ]
    assert done.warnings[0].startswith(
        "nothing that can be seen runs on deleted or replaced files, but 2 processes could not be read."
    )
    assert done.warnings[1] == "of 2 of them a page fault waits for a file system that does not answer"


def test_a_file_of_which_it_cannot_be_told_is_listed_as_unknown_with_the_reason(listed: Any) -> None:
    ours = ProcFs().stat(os.getpid())
    assert ours
    out_of_reach = Library("/no/such/file.so", FileId(254, 0, 1))

    (line,) = listed([Entry(Process(os.getpid(), ours.start_ns), out_of_reach)], "--stale", "--json").lines()

    assert (line["stale"], line["package"]) == ("unknown", None)
    assert line["stale_reason"].startswith("its path leads nowhere")
