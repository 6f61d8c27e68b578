"""The Debian package in clean roots of the releases it is for: installed, run and purged. `scripts/deb --test`.

There is no compiler in these roots, and nothing of sowatch's but the package.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clean_root import Root
from support.booted import HOST_PROC, booted
from support.debian import python_version

#: Of fixtures, too: making a root is what takes time.
pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).resolve().parents[2]
SUITES = os.environ.get("SOWATCH_DEB_SUITES", "bookworm trixie").split()
#: What the package depends on, and what looks at its parts.
PACKAGES = ["python3", "libbpf1", "libgcc-s1", "ca-certificates", "systemd", "man-db", "bash-completion", "zsh", "fish"]
#: What dpkg and apt keep for themselves, and the index of man pages.
THEIRS = ("/var/lib/dpkg/", "/var/lib/apt/", "/var/cache/", "/var/log/apt/", "/var/log/dpkg.log", "/tmp/", "/build")
DEB = "/build/dist/sowatch.deb"


def package() -> Path:
    made = sorted((ROOT / "dist").glob("sowatch_*.deb"))
    assert len(made) == 1, "scripts/deb makes the package"
    return made[0]


def open_root(suite: str) -> Root:
    return Root(suite, PACKAGES, {DEB: package()})


@pytest.fixture(scope="module", params=SUITES)
def suite(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(suite) -> Iterator[Root]:
    with open_root(suite) as made:
        made.install(DEB)
        yield made


def files(root: Root) -> set[str]:
    listed = root.run(["find", "/", "-xdev", "-printf", "%y %m %u:%g %p %l\n"]).stdout.splitlines()
    return {line for line in listed if not line.split(" ")[3].startswith(THEIRS)}


def packages(root: Root) -> set[str]:
    return set(root.run(["dpkg-query", "--show", "--showformat", "${Package} ${Status}\n"]).stdout.splitlines())


def package_version(root: Root) -> str:
    """Of the package, as Debian writes it."""
    return root.run(["dpkg-query", "--show", "--showformat", "${Version}", "sowatch"]).stdout


def test_there_is_no_compiler_and_no_header_of_libbpf(root) -> None:
    for name in ("cc", "gcc", "clang", "pkg-config", "pip"):
        assert root.run(["sh", "-c", f"command -v {name}"], check=False).returncode != 0, name
    assert root.run(["test", "-e", "/usr/include/bpf/bpf.h"], check=False).returncode != 0


def test_the_command_shows_the_version_of_the_package(root) -> None:
    version = package_version(root)
    assert root.run(["sowatch", "--version"]).stdout == f"sowatch {python_version(version)}\n"


def test_only_the_package_itself_is_installed(suite) -> None:
    with open_root(suite) as fresh:
        before = packages(fresh)
        fresh.install(DEB)
        assert packages(fresh) - before == {"sowatch install ok installed"}


def test_doctor_finds_that_the_core_strategy_works(root) -> None:
    report = json.loads(root.run(["sowatch", "doctor", "--json"]).stdout)
    assert report["decision"]["strategy"] == "core"
    assert report["decision"]["guarantee"] == "exact"


def test_watch_reports_a_library_that_a_process_of_the_root_loads(root) -> None:
    command = root.command(["sowatch", "watch", "--json", "--strategy", "core", "--kind", "library", "libbz2"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        events = (json.loads(line) for line in watch.stdout)
        assert next(event for event in events if event["event"] == "ready")["strategy"] == "core"
        root.run(["python3", "-c", "import bz2"])
        load = next(event for event in events if event["event"] == "load" and event["cause"] == "mmap")
        watch.send_signal(signal.SIGTERM)
        last = list(events)[-1]
    assert load["process"]["comm"] == "python3"
    assert "/libbz2.so.1.0" in load["library"]["path"]
    assert last["event"] == "stopped"
    assert watch.returncode == 0


def test_the_agent_takes_the_configuration_that_is_installed(root) -> None:
    assert root.run(["sowatch", "serve", "--check"]).stdout == "the settings are right\n"


def test_http_has_what_it_needs(root) -> None:
    command = root.command(["sowatch", "http", "--json", "--duration", "0.1"])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_systemd_finds_nothing_wrong_with_the_unit(root) -> None:
    done = root.run(["systemd-analyze", "verify", "sowatch.service"], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bash_loads_the_completion_when_it_is_asked_for(root) -> None:
    script = """
        . /usr/share/bash-completion/bash_completion
        _completion_loader sowatch 2>/dev/null || _comp_load sowatch
        function_name=$(complete -p sowatch | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        COMP_WORDS=(sowatch list --st) COMP_CWORD=2
        "$function_name" sowatch --st list
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    assert set(root.run(["bash", "-c", script]).stdout.split()) == {"--stale", "--strategy"}


def test_fish_completes_commands_options_and_values(root) -> None:
    def complete(line: str) -> set[str]:
        found = root.run(["fish", "-c", f"complete -C {line!r}"]).stdout.splitlines()
        return {one.split("\t")[0] for one in found}

    assert complete("sowatch wa") == {"watch"}
    assert "--stale" in complete("sowatch list --sta")  # fish 4 offers --strategy as well: it has s, t and a
    assert complete("sowatch watch --strategy p") == {"prebuilt", "procfs"}


def test_zsh_completes_commands_and_options(root) -> None:
    # In a terminal of its own, as zsh completes in its line editor only.
    script = """
        zmodload zsh/zpty
        zpty -b shell zsh -f -i
        await() {
            local seen= line
            repeat 300; do
                while zpty -r -t shell line; do seen+=$line; done
                [[ $seen == *$1* ]] && break
                sleep 0.1
            done
            print -r -- $seen
        }
        zpty -w shell 'autoload -Uz compinit; compinit -u; print START${:-ED}'
        await STARTED
        zpty -w -n shell $'sowatch list --st\\t'
        await --strategy
        zpty -w -n shell $'\\x15sowatch wa\\t'
        await watch
        zpty -d shell
    """
    shown = root.run(["zsh", "-f", "-c", script], environment={"TERM": "xterm"}).stdout
    assert "--stale" in shown
    assert "sowatch watch" in shown


def test_each_man_page_is_shown_and_has_no_fault(root) -> None:
    pages = root.run(["sh", "-c", "cd /usr/share/man/man1 && ls sowatch*"]).stdout.split()
    assert len(pages) > 10
    version = python_version(package_version(root))
    for page in pages:
        head = root.run(["zgrep", "-m", "1", "^[.]TH ", f"/usr/share/man/man1/{page}"]).stdout
        assert f'"sowatch {version}"' in head.replace("\\-", "-")
        done = root.run(["man", "--warnings", "--encoding=ascii", page.removesuffix(".1.gz")])
        assert done.stderr == ""
        assert "SYNOPSIS" in done.stdout


def test_the_unit_is_neither_enabled_nor_started_by_the_installation(root) -> None:
    assert root.run(["systemctl", "is-enabled", "sowatch"], check=False).stdout == "disabled\n"


def test_what_a_user_has_on_pythons_path_does_not_get_into_the_command(root) -> None:
    shadow = {"PYTHONPATH": "/tmp/shadow"}
    root.run(["sh", "-c", "mkdir -p /tmp/shadow && echo 'raise SystemExit(9)' >/tmp/shadow/msgspec.py"])
    assert root.run(["sowatch", "--version"], environment=shadow).returncode == 0


def test_systemctl_starts_restarts_and_stops_the_agent_and_purge_removes_what_it_made(suite, wait_until) -> None:
    """In a pid namespace, as a machine has one systemd: so the strategy is `prebuilt`, with the host's /proc given."""
    with open_root(suite) as fresh, booted(fresh, wait_until) as machine:
        assert machine.run("dpkg", "--install", DEB).returncode == 0
        assert machine.run("systemctl", "is-active", "sowatch").stdout == "inactive\n"
        refused = machine.run("systemctl", "start", "sowatch")
        log = machine.run("journalctl", "--no-pager", "--unit=sowatch").stdout
        assert refused.returncode != 0
        assert "Run it in the host's pid namespace" in log

        settings = f'[watch]\\nproc_root = "{HOST_PROC}"\\n'
        machine.run("sh", "-c", f"printf '{settings}' >/etc/sowatch/config.toml")
        started = machine.run("systemctl", "restart", "sowatch")
        log = machine.run("journalctl", "--no-pager", "--unit=sowatch").stdout
        assert started.returncode == 0, log
        shown = machine.run("systemctl", "show", "--property=ActiveState,StatusText,NRestarts", "sowatch").stdout
        assert "ActiveState=active\n" in shown
        assert "StatusText=watching by prebuilt" in shown
        assert 'msg="gave up privileges"' in log
        listed = machine.run("sowatch", "list", "--agent", "--json")
        assert json.loads(listed.stdout.splitlines()[0])["source"] == "agent", listed.stderr
        assert machine.run("systemctl", "reload", "sowatch").returncode == 0

        def main_pid() -> str:
            return machine.run("systemctl", "show", "--property=MainPID", "sowatch").stdout

        before = main_pid()
        machine.run("systemctl", "enable", "sowatch")
        # The package again, as an upgrade, with the configuration that was changed.
        assert machine.run("dpkg", "--install", "--force-confold", DEB).returncode == 0
        assert machine.run("systemctl", "is-active", "sowatch").stdout == "active\n"
        assert main_pid() not in (before, "MainPID=0\n")

        assert machine.run("systemctl", "stop", "sowatch").returncode == 0
        made = ("/var/log/private/sowatch", "/var/cache/private/sowatch")
        assert [path for path in made if machine.run("test", "-d", path).returncode] == []
        assert machine.run("dpkg", "--purge", "sowatch").returncode == 0
        left = machine.run(
            "find", "/etc", "/usr", "/var", "/run", "-name", "*sowatch*", "-not", "-path", "/var/lib/dpkg/*"
        )
        assert left.stdout == ""


def test_purge_leaves_nothing(suite) -> None:
    with open_root(suite) as fresh:
        fresh.run(["apt-get", "-qq", "update"])
        before = files(fresh)
        fresh.run(["apt-get", "-qq", "-y", "install", DEB])
        installed = files(fresh) - before
        fresh.run(["sowatch", "doctor"])
        fresh.run(["sowatch", "list"])
        # What the service makes, by hand: there is no systemd that runs.
        fresh.run(["sh", "-c", "mkdir -p /var/log/private/sowatch && ln -s private/sowatch /var/log/sowatch"])
        fresh.run(["apt-get", "-qq", "-y", "purge", "sowatch"])
        left = files(fresh) - before
        gone = before - files(fresh)
    assert any("/usr/lib/sowatch/sowatch/bpf/programs/" in one for one in installed)
    assert any(one.endswith(".pyc ") for one in installed), "compiled when it is installed"
    assert (left, gone) == (set(), set())
