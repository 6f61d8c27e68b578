"""`sowatch list` and `explain` as people type them: real processes in real cgroups, on real stale files.

They were replaced by rename, rebuilt identically, overwritten and deleted. Nothing changes once it stands.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support import strict
from support.cgroups import Cgroups
from support.kernel import TAG
from support.programs import Mapper, compile_library
from support.screen import Terminal

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes cgroups")

HEX = os.urandom(32).hex()
ID = HEX[:12]
#: Units that no service manager has; the last one is of a user's manager, as its path says.
WEB, SESSION = f"web{TAG}.service", "session-7.scope"
APP = f"app{TAG}.service"


class Host(NamedTuple):
    """Where the files are, and who runs."""

    directory: Path
    web: tuple[int, int]
    app: int
    container: int
    session: int
    server: int
    modified: str

    @property
    def pattern(self) -> str:
        return re.escape(f"{self.directory}/")

    def pid(self, pid: int) -> str:
        """As a column of these pids has it."""
        return str(pid).rjust(max(len(str(one)) for one in (*self.web, *self[2:6])))


@pytest.fixture(scope="module")
def host(programs: Any, wait_until: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    sockets = tmp_path_factory.mktemp("s")
    # Short, so that rows have the width that they have on hosts.
    directory = Path(tempfile.mkdtemp(prefix="sw", dir="/tmp"))
    cgroups = Cgroups(sockets / "cgroups")
    with contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, directory)
        ends.callback(cgroups.close, wait_until)
        for name in ("liba.so", "libgone.so", "libsame.so", "libmod.so", "libkept.so"):
            compile_library(directory / name)
        shutil.copy(programs.variant("mapper", "-static", "-Wno-error"), directory / "server")

        def start(cgroup: str | None, *names: str, program: Path = programs["mapper"]) -> int:
            running = ends.enter_context(Mapper(program, sockets))
            for name in names:
                running.map(directory / name)
            if cgroup is not None:
                cgroups.put(running.pid, cgroup)
            return running.pid

        web = (start(WEB, "liba.so", "libgone.so", "libkept.so"), start(f"{WEB}/worker", "liba.so"))
        app = start(f"u{TAG}.slice/user@1234.service/{APP}", "libmod.so")
        container = start(f"docker-{HEX}.scope", "liba.so")
        session = start(f"u{TAG}.slice/{SESSION}", "libsame.so")
        server = start(None, program=directory / "server")
        started_ns = time.time_ns()

        compile_library(directory / "new/liba.so", ["other"]).rename(directory / "liba.so")
        compile_library(directory / "new/libsame.so").rename(directory / "libsame.so")
        shutil.copy(programs["loader"], directory / "new/server")
        (directory / "new/server").rename(directory / "server")
        (directory / "libgone.so").unlink()
        data = (directory / "libmod.so").read_bytes()

        def is_later() -> bool:
            (directory / "libmod.so").write_bytes(data)
            return (directory / "libmod.so").stat().st_mtime_ns > started_ns + 10**7

        wait_until(is_later, what="a clock that is past the start of the process")
        modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((directory / "libmod.so").stat().st_mtime))
        yield Host(directory, web, app, container, session, server, modified)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sowatch", *words], capture_output=True, text=True, check=False)


def rows(*words: str) -> list[str]:
    done = run("list", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def on_terminal(columns: int, deadline: Any, *words: str) -> list[str]:
    """What a person sees of it."""
    command = [sys.executable, "-m", "sowatch", *words]
    with Terminal(command, columns=columns, rows=60, timeout_s=deadline(60)) as terminal:
        assert terminal.wait_for_end() == 0
        lines = terminal.lines()
    end = next(at for at, line in enumerate(lines) if line.startswith("sowatch: one scan"))
    return lines[:end]


def stale_rows(host: Host) -> list[str]:
    """In a pipe, and where there is room for it."""
    at, pid = host.directory, host.pid
    units = [f"{APP} (user@1234.service)", WEB, ID, SESSION, "(no unit)"]
    written = f"it was written to at {host.modified}, after its process had started"
    unit = [one.ljust(max(map(len, units))) for one in units]
    return [
        f"{'UNIT OR CONTAINER':{len(unit[0])}}  PROCESSES  RESTART",
        f"  {'PID'.rjust(len(pid(1)))}  COMM    STALE     PACKAGE  PATH",
        f"{unit[0]}          1  systemctl --user --machine=1234@ restart {APP}",
        f"  {pid(host.app)}  mapper  modified  -        {at}/libmod.so ({written})",
        f"{unit[1]}          2  systemctl restart {WEB}",
        f"  {pid(host.web[0])}  mapper  replaced  -        {at}/liba.so",
        f"  {pid(host.web[0])}  mapper  deleted   -        {at}/libgone.so",
        f"  {pid(host.web[1])}  mapper  replaced  -        {at}/liba.so",
        f"{unit[2]}          1  docker restart {ID}",
        f"  {pid(host.container)}  mapper  replaced  -        {at}/liba.so",
        f"{unit[3]}          1  - (what is on disk is the same build)",
        f"  {pid(host.session)}  mapper  replaced  -        {at}/libsame.so (an identical build)",
        f"{unit[4]}          1  - (end it and start it again)",
        f"  {pid(host.server)}  server  replaced  -        {at}/server",
    ]


def test_stale_files_stand_below_what_has_to_be_restarted(host: Host, deadline: Any) -> None:
    assert rows("--stale", host.pattern) == stale_rows(host)
    assert on_terminal(200, deadline, "list", "--stale", host.pattern) == stale_rows(host)


def test_a_row_that_is_wider_than_the_terminal_has_its_last_cell_below_it(host: Host, deadline: Any) -> None:
    at_restart = stale_rows(host)[0].index("RESTART")
    expected = []
    for row in stale_rows(host):
        start = row.find(str(host.directory)) if row.startswith("  ") else at_restart
        if len(row) <= 80:
            expected.append(row)
        elif "libmod.so" in row:
            expected += [
                row[:start].rstrip(),
                f"      {host.directory}/libmod.so (it was written to at {host.modified},",
                "      after its process had started)",
            ]
        else:
            expected += [row[:start].rstrip(), f"      {row[start:]}"]

    shown = on_terminal(80, deadline, "list", "--stale", host.pattern)

    assert shown == expected
    assert max(map(len, shown)) <= 80
    assert len(shown) > len(stale_rows(host))


def test_a_plan_is_commands_and_comments(host: Host) -> None:
    lines = rows("--stale", "--plan", host.pattern)
    # Builds are those of libraries that were compiled for this test.
    assert [re.sub(r"\(build [0-9a-f]{12}\)", "(build)", line) for line in lines] == [
        f"# {APP} (user@1234.service): 1 process (mapper, {host.app}); still runs libmod.so (build)",
        f"systemctl --user --machine=1234@ restart {APP}",
        f"# {WEB}: 2 processes (mapper, {host.web[0]}, {host.web[1]}); still run liba.so (build), libgone.so (build)",
        f"systemctl restart {WEB}",
        f"# {ID}: 1 process (mapper, {host.container}); still runs liba.so (build)",
        f"docker restart {ID}",
        f"# {SESSION}: what is on disk is the same build ({host.session} mapper)",
        f"# (no unit): 1 process (server, {host.server}); still runs server (build)",
        f"# {host.server} server: end it and start it again",
    ]


def test_a_plan_as_json_has_what_each_restart_is_for(host: Host, schema: Any) -> None:
    head, *lines = map(strict.loads, rows("--stale", "--plan", "--json", host.pattern))
    for line in (head, *lines):
        schema(line)
    assert [(line["event"], line["kind"], line["command"]) for line in lines] == [
        ("restart", "unit", f"systemctl --user --machine=1234@ restart {APP}"),
        ("restart", "unit", f"systemctl restart {WEB}"),
        ("restart", "container", f"docker restart {ID}"),
        ("restart", "session", None),
        ("restart", "process", None),
    ]
    assert [line["why_not"] for line in lines] == [*[None] * 3, "what is on disk is the same build", None]
    assert [[one["process"]["pid"] for one in line["processes"]] for line in lines] == [
        *([host.app], [*host.web], [host.container], [host.session], [host.server])
    ]
    files = [(Path(one["library"]["path"]).name, one["stale"]) for one in lines[1]["processes"][0]["files"]]
    assert files == [("liba.so", "replaced"), ("libgone.so", "deleted")]
    assert {(*line["listen"],) for line in lines} == {()}


def test_a_check_answers_by_its_exit_code(host: Host) -> None:
    found = run("list", "--stale", "--check", "--comm", "^mapper$", f"{host.pattern}libgone")
    nothing = run("list", "--stale", "--check", f"{host.pattern}libkept")

    assert (found.returncode, len(found.stdout.splitlines()), found.stderr) == (1, 4, "")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")


def test_stale_files_are_grouped_by_process_by_container_and_by_file(host: Host) -> None:
    at, pid = host.directory, host.pid
    by_process = rows("--stale", "--by", "process", f"{host.pattern}liba", "--no-headers")
    by_container = rows("--stale", "--by", "container", f"{host.pattern}liba")
    by_library = rows("--stale", "--by", "library", f"{host.pattern}liba")

    assert [row.split() for row in by_process] == [
        [str(host.web[0]), "mapper", "replaced", "-", WEB, "-", f"{at}/liba.so"],
        [str(host.web[1]), "mapper", "replaced", "-", WEB, "-", f"{at}/liba.so"],
        [str(host.container), "mapper", "replaced", "-", "-", ID, f"{at}/liba.so"],
    ]
    assert by_container == [
        "CONTAINER     PROCESSES  RESTART",
        f"  {'PID'.rjust(len(pid(1)))}  COMM    STALE     PACKAGE  PATH",
        f"(host)                2  systemctl restart {WEB}",
        f"  {pid(host.web[0])}  mapper  replaced  -        {at}/liba.so",
        f"  {pid(host.web[1])}  mapper  replaced  -        {at}/liba.so",
        f"{ID}          1  docker restart {ID}",
        f"  {pid(host.container)}  mapper  replaced  -        {at}/liba.so",
    ]
    assert [" ".join(row.split()) for row in by_library[:2]] == [
        "PROCESSES CONTAINERS KIND BUILD ID STALE PACKAGE PATH",
        "COMM USER UNIT OR CONTAINER PIDS",
    ]
    assert [row.split() for row in by_library[3:]] == [
        ["mapper", "root", WEB, f"{host.web[0]},{host.web[1]}"],
        ["mapper", "root", ID, str(host.container)],
    ]


def test_json_has_how_each_process_is_restarted(host: Host) -> None:
    lines = [strict.loads(line) for line in rows("--stale", "--json", host.pattern)]
    found = {
        (line["process"]["pid"], Path(line["library"]["path"]).name): (
            line["stale"],
            line.get("same_build"),
            line["unit"],
            line["restart"],
            line["restart_advice"],
        )
        for line in lines
        if line["event"] == "mapping"
    }

    assert found == {
        (host.web[0], "liba.so"): ("replaced", False, WEB, f"systemctl restart {WEB}", None),
        (host.web[0], "libgone.so"): ("deleted", None, WEB, f"systemctl restart {WEB}", None),
        (host.web[1], "liba.so"): ("replaced", False, WEB, f"systemctl restart {WEB}", None),
        (host.app, "libmod.so"): ("modified", None, APP, f"systemctl --user --machine=1234@ restart {APP}", None),
        (host.container, "liba.so"): ("replaced", False, None, f"docker restart {ID}", None),
        (host.session, "libsame.so"): ("replaced", True, SESSION, None, "log out of session 7"),
        (host.server, "server"): ("replaced", False, None, None, "end it and start it again"),
    }


def test_with_a_pattern_who_has_a_file_is_shown_on_any_terminal(host: Host, deadline: Any) -> None:
    at, pids = host.directory, f"{host.web[0]},{host.web[1]}"
    unit = max(len(WEB), len("UNIT OR CONTAINER"))
    [build_id] = {row.split()[3] for row in rows(f"{host.pattern}liba", "--no-headers") if "replaced" in row}
    expected = [
        "PROCESSES  CONTAINERS  KIND     BUILD ID      STALE     PATH",
        f"  COMM    USER  {'UNIT OR CONTAINER':{unit}}  PIDS",
        f"        3           1  library  {build_id}  replaced  {at}/liba.so",
        f"  mapper  root  {WEB:{unit}}  {pids}",
        f"  mapper  root  {ID:{unit}}  {host.container}",
    ]

    assert rows(f"{host.pattern}liba") == expected
    assert on_terminal(200, deadline, "list", f"{host.pattern}liba") == expected
    assert on_terminal(80, deadline, "list", f"{host.pattern}liba")[3:] == expected[3:]


@pytest.mark.parametrize(
    ("words", "who"),
    [
        (["--unit", WEB], ["web"]),
        (["--unit", f"!{WEB}"], ["app", "container", "session"]),
        (["--cgroup", "worker"], ["web"]),
        (["--comm", "!^mapper$"], []),
        (["--exe", "/mapper"], ["app", "container", "session", "web"]),
        (["--user", "root,1234"], ["app", "container", "session", "web"]),
        (["--container", HEX[:9]], ["container"]),
        (["--exports", "other"], []),
        (["--exports", "!other"], ["app", "container", "session", "web"]),
    ],
)
def test_filters_choose_who_is_listed(host: Host, words: list[str], who: list[str]) -> None:
    pids = {int(one) for one in rows(*words, "-o", "pid", "--no-headers", host.pattern)}
    names = {name for name in ("app", "container", "session") if getattr(host, name) in pids}

    assert sorted(names | ({"web"} if pids & set(host.web) else set())) == who
    assert pids <= {*host.web, host.app, host.container, host.session}


def test_files_are_chosen_by_their_build_ids(host: Host, tmp_path: Path) -> None:
    found = rows("-o", "build_id,path", "--no-headers", f"{host.pattern}lib(kept|gone)")
    ids = {Path(path).name: build_id for build_id, path in map(str.split, found)}
    (tmp_path / "ids").write_text(f"# theirs\n{ids['libgone.so'].upper()} CVE-2026-1\n{'0' * 40}\n")

    by_file = rows("--match-build-ids", str(tmp_path / "ids"), "-o", "pid,path", "--no-headers")
    by_prefix = rows("--build-id", ids["libkept.so"][:10], "-o", "pid,path", "--no-headers")

    assert [row.split() for row in by_file] == [[str(host.web[0]), f"{host.directory}/libgone.so"]]
    assert [row.split() for row in by_prefix] == [[str(host.web[0]), f"{host.directory}/libkept.so"]]


def test_csv_is_read_back_by_others(host: Host) -> None:
    found = list(csv.DictReader(rows("--stale", "--format", "csv", f"{host.pattern}lib(gone|mod)")))

    assert found == [
        {
            "unit": f"{APP} (user@1234.service)",
            "container": "",
            "restart": f"systemctl --user --machine=1234@ restart {APP}",
            "pid": str(host.app),
            "comm": "mapper",
            "stale": "modified",
            "package": "",
            "path": f"{host.directory}/libmod.so",
        },
        {
            "unit": WEB,
            "container": "",
            "restart": f"systemctl restart {WEB}",
            "pid": str(host.web[0]),
            "comm": "mapper",
            "stale": "deleted",
            "package": "",
            "path": f"{host.directory}/libgone.so",
        },
    ]


def test_a_container_that_there_is_not_is_an_error_and_not_an_empty_list() -> None:
    done = run("list", "--container", "nosuch")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "sowatch: there is no container whose id begins with 'nosuch' in which a process runs. "
        "`sowatch list --by container` shows them."
    )


def test_explain_finds_a_file_by_its_base_name(host: Host) -> None:
    found, near = run("explain", "libkept.so"), run("explain", "libkep")

    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"path       {host.directory}/libkept.so\n")
    assert f"\n{host.web[0]}  mapper  this file" in found.stdout
    assert (near.returncode, near.stdout) == (1, "")
    assert "named 'libkep' mapped; there are libkept.so." in near.stderr


def test_explain_shows_the_start_by_the_clock_and_what_was_replaced(host: Host) -> None:
    done = run("explain", str(host.web[0]))
    lines = done.stdout.splitlines()
    at = lines.index(f"{host.directory}/liba.so (replaced)")
    report = strict.loads(run("explain", "--json", str(host.session)).stdout)
    [same] = [one for one in report["mappings"] if one["library"]["path"].endswith("/libsame.so")]

    clock, _, since = lines[1].removeprefix("start      ").partition(", ")
    assert (
        time.time() - 3600 < time.mktime(time.strptime(clock[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone <= time.time()
    )
    assert since.endswith(" s after boot")
    assert "  on disk  replaced: its path leads to another file now" in lines[at : at + 4]
    assert f"{host.directory}/libgone.so (deleted)" in lines
    assert f"{host.directory}/libkept.so" in lines
    assert report["started"][:16] in {clock[:16], time.strftime("%Y-%m-%dT%H:%M", time.gmtime())}
    assert (same["stale"], same["same_build"]) == ("replaced", True)
