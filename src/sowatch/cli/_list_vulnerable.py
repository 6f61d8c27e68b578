"""``list --vulnerable``: which processes have affected files mapped, by data that the user brings."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from msgspec import Struct

from sowatch.linux.cgroups import unit_of
from sowatch.model.errors import UsageError
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from sowatch.cli._list_entries import ListEntry
    from sowatch.cli._out import Out
    from sowatch.cli._parser import Parser
    from sowatch.inventory.packages import PackageIdentity
    from sowatch.inventory.vulnerabilities import Finding, Vulnerabilities
    from sowatch.linux.proc import ProcFs
    from sowatch.model import wire
    from sowatch.model.identity import ProcessId

__all__ = [
    "Judged",
    "add_vulnerable",
    "check_options",
    "conclude",
    "judge",
    "load",
    "write_json",
    "write_text",
]

#: Exit codes of --check.
FOUND, OPEN = 1, 3
_OPTIONS = ("osv", "build_ids", "vex")


class Judged(Struct, frozen=True):
    """What is mapped, and what is known of it.

    Attributes:
        data: by which it was judged.
        rows: each process and file with its package and its findings.
        files: how many different files there are.
        without_package: of how many of them the package is not known.
        unknown: of how many others anything is unknown.
        open_files: how many of all of them may be affected by what nobody knows.
    """

    data: Vulnerabilities
    rows: tuple[tuple[ListEntry, PackageIdentity | None, tuple[Finding, ...]], ...]
    files: int
    without_package: int
    unknown: int
    open_files: int

    @property
    def affected(self) -> list[tuple[ListEntry, PackageIdentity | None, Finding]]:
        """What is affected by what."""
        return [
            (entry, package, one) for entry, package, found in self.rows for one in found if one.status == "affected"
        ]

    @property
    def open(self) -> list[tuple[ListEntry, PackageIdentity | None, Finding]]:
        """What may be affected by a vulnerability that has a name."""
        return [(entry, package, one) for entry, package, found in self.rows for one in found if one.is_open and one.id]


def add_vulnerable(parser: Parser) -> None:
    """Add the options."""
    group = parser.add_argument_group("vulnerabilities", "Data that you bring: nothing is bundled, nothing is fetched.")
    group.add_argument(
        "--vulnerable", action="store_true", help="only files that are affected, by what the options below name"
    )
    group.add_argument(
        "--osv",
        action="append",
        default=[],
        metavar="PATH",
        help="advisories of OSV: a JSON file, a zip archive, or a directory with any of them below it",
    )
    group.add_argument(
        "--build-ids",
        action="append",
        default=[],
        metavar="FILE",
        help="lines BUILD_ID,ID[,NOTE]: builds that are affected by what ID names",
    )
    group.add_argument(
        "--vex", action="append", default=[], metavar="FILE", help="statements of OpenVEX, which change what was found"
    )


def check_options(args: Namespace) -> None:
    """Refuses what contradicts itself.

    Raises:
        UsageError: there is something.
    """
    named = [name for name in _OPTIONS if getattr(args, name)]
    if not args.vulnerable:
        if named:
            raise UsageError(f"--{named[0].replace('_', '-')} is about vulnerable files. Add --vulnerable.")
        return
    if not named:
        raise UsageError("--vulnerable takes data. Name them: --osv DIR, --build-ids FILE or --vex FILE.")
    if args.stale or args.plan:
        raise UsageError("--vulnerable and --stale are two questions. Ask one after the other.")
    if args.agent is not None:
        raise UsageError("an agent does not answer what is vulnerable here: leave out --agent. It has metrics of it.")
    if args.columns is not None or args.no_headers or args.by is not None or args.format == "csv":
        raise UsageError("--vulnerable has a table of its own, and JSON. Leave out --by, -o, --no-headers and CSV.")


def load(args: Namespace) -> Vulnerabilities:
    """The data that the options name.

    Raises:
        SowatchError: something is not there, or not what it was named as.
    """
    from sowatch.inventory.vulnerabilities import load_vulnerabilities

    return load_vulnerabilities(args.osv, args.build_ids, args.vex, packs=False)


def judge(entries: Sequence[ListEntry], data: Vulnerabilities, proc: ProcFs) -> Judged:
    """Finds the packages of what is mapped, and what is known of them."""
    from sowatch.inventory.packages import Packages

    with closing(Packages(proc)) as packages:
        identities = packages.identify(entry.mapped for entry in entries)
    products: dict[ProcessId, PackageIdentity | None] = {
        entry.process.id: identity
        for entry, identity in zip(entries, identities, strict=True)
        if entry.library.kind == "executable"
    }
    rows = tuple(
        (entry, identity, data.findings(identity, entry.library.build_id, products.get(entry.process.id)))
        for entry, identity in zip(entries, identities, strict=True)
    )
    files = {(entry.library.id, entry.library.path): (identity, found) for entry, identity, found in rows}
    without = sum(identity is None for identity, _ in files.values())
    open_ = [identity for identity, found in files.values() if any(one.is_open for one in found)]
    unknown = sum(identity is not None for identity in open_)
    return Judged(data, rows, len(files), without, unknown, len(open_))


def write_json(out: Out, head: wire.Head, judged: Judged) -> int:
    """Lines: the head, each process, file and finding, and the data; returns the last one's number."""
    from sowatch.inventory.mapping_lines import package_line
    from sowatch.model import wire_lists
    from sowatch.model.encoding import dumps
    from sowatch.model.lines import library_line, process_line
    from sowatch.model.wire import SCHEMA

    out.write(dumps(head) + "\n")
    seq = 1
    for entry, package, found in judged.rows:
        unit = unit_of(entry.process.cgroup)
        for one in found:
            seq += 1
            line = wire_lists.Vulnerable(
                SCHEMA,
                "vulnerable",
                seq,
                one.status,
                one.id,
                [*one.aliases, *one.upstream],
                one.severity,
                one.fixed_version,
                one.reason,
                one.summary,
                one.found_by,
                package_line(package),
                unit and unit.name,
                process_line(entry.process),
                library_line(entry.library),
            )
            out.write(dumps(line) + "\n")
    seq += 1
    data = judged.data
    summary = wire_lists.VulnerabilityData(
        SCHEMA,
        "vulnerability_data",
        seq,
        len(data.osv),
        data.osv.newest or None,
        list(data.problems),
        judged.files,
        judged.without_package,
        judged.unknown,
        _processes(judged.affected),
    )
    out.write(dumps(summary) + "\n")
    return seq


def write_text(out: Out, judged: Judged, *, has_head: bool = True) -> None:
    """A row for each vulnerability and package, worst status first, and who has it mapped below."""
    from sowatch.cli._list_columns import word
    from sowatch.cli._list_views import who_rows
    from sowatch.cli._table import Below, write_table

    groups: dict[tuple[str, ...], list[ListEntry]] = {}
    for entry, package, one in (*judged.affected, *judged.open):
        key = (
            word(one.id),
            _severity(one.severity),
            one.status.replace("_", " "),
            word(package.name if package else None),
            word(package.version if package else None),
            word(one.fixed_version),
            word(one.reason if one.is_open or one.found_by != "osv" or one.reason else one.summary),
        )
        groups.setdefault(key, []).append(entry)
    rows = [(*key[:6], str(len({entry.process.id for entry in group})), key[6]) for key, group in groups.items()]
    head = ("ID", "SEVERITY", "STATUS", "PACKAGE", "VERSION", "FIXED IN", "PROCESSES", "WHAT")
    below = Below(("COMM", "USER", "UNIT OR CONTAINER", "PIDS"), [who_rows(group) for group in groups.values()])
    write_table(out, head, rows, right=(6,), warning=2, below=below, has_head=has_head)


def _severity(text: str | None) -> str:
    """A vector is too long for a table: its version has to do."""
    from sowatch.cli._list_columns import word

    return word(text.partition("/")[0] if text and text.startswith("CVSS:") else text)


def _processes(rows: Iterable[tuple[ListEntry, object, object]]) -> int:
    return len({entry.process.id for entry, _, _ in rows})


def conclude(
    judged: Judged, open_ends: Sequence[str], warn: Callable[[str], None], *, is_check: bool, is_quiet: bool
) -> int:
    """Writes what was asked and what is open; returns the exit code."""
    affected = judged.affected
    ids = len({one.id for _, _, one in affected})
    data = judged.data
    if not is_quiet:
        what = "no mapped file is known to be affected"
        if affected:
            found = counted(ids, "vulnerability", "vulnerabilities")
            what = f"{found} in files of {counted(_processes(affected), 'process', 'processes')}"
        warn(f"{what}, by {_named(data)}.")
        warn(
            f"of {counted(judged.files, 'mapped file')} the package of {judged.without_package} is not known; "
            f"{judged.open_files} may be affected by what nobody knows."
        )
    for problem in data.problems:
        warn(f"{problem}. What is not found may be in there.")
    for open_end in open_ends:
        warn(open_end)
    if not is_check:
        return OPEN if open_ends else 0
    if affected:
        return FOUND
    return OPEN if open_ends or data.problems or judged.open_files else 0


def _named(data: Vulnerabilities) -> str:
    """How much data that are."""
    newest = f" (the newest of {data.osv.newest[:10]})" if data.osv.newest else ""
    parts = [
        counted(len(data.osv), "advisory", "advisories") + newest if len(data.osv) else "",
        counted(len(data.build_ids), "build id") if data.build_ids else "",
        counted(data.vex.statements, "statement of VEX", "statements of VEX") if data.vex.statements else "",
    ]
    return ", ".join(filter(None, parts)) or "no data: there are none in what was named"
