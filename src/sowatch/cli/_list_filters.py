"""The filters of ``list``: which processes and files are shown."""

from __future__ import annotations

import pwd
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from sowatch.linux.cgroups import unit_of
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.rules import Rule, compile_pattern

if TYPE_CHECKING:
    from sowatch.cli._parser import Parser
    from sowatch.model.events import Library, Process

__all__ = ["EXCLUDED", "Filters", "add_filters", "filters_of", "with_exports"]

#: A uid has 32 bits.
_UID_DIGITS: Final = 10
#: Begins the names of rules that want what is left out.
EXCLUDED: Final = "left out: "
_BUILD_ID: Final = re.compile("[0-9a-f]{2,}")
_OPEN, _CLOSE = "([{", ")]}"

_SEARCHED: Final = "a Python regular expression, searched"


class _Terms(NamedTuple):
    """What one option asks for: any of ``wanted``, if there are some, and none of ``unwanted``."""

    wanted: tuple[Callable[[str], bool], ...] = ()
    unwanted: tuple[Callable[[str], bool], ...] = ()

    def take(self, value: str | None) -> bool:
        if value is None:
            return not self.wanted
        if self.wanted and not any(one(value) for one in self.wanted):
            return False
        return not any(one(value) for one in self.unwanted)


class Filters(Struct, frozen=True):
    """What the command line asks for beside patterns, kinds, pids and the container."""

    unit: _Terms = _Terms()
    user: _Terms = _Terms()
    comm: _Terms = _Terms()
    exe: _Terms = _Terms()
    cgroup: _Terms = _Terms()
    pod: _Terms = _Terms()
    namespace: _Terms = _Terms()
    build_id: _Terms = _Terms()
    #: Of ``--match-build-ids``; None: any.
    build_ids: frozenset[str] | None = None

    def take_process(self, process: Process, *, is_readable: bool = True) -> bool:
        """Whether a process is asked for; of one that is not readable executable and pod are unknown, and so may be."""
        unit = unit_of(process.cgroup)
        return (
            self.unit.take(unit and unit.name)
            and self.user.take(None if process.uid is None else str(process.uid))
            and self.comm.take(process.comm)
            and self.cgroup.take(process.cgroup)
            and (not is_readable or (self.exe.take(process.exe) and self._take_pod(process)))
        )

    def _take_pod(self, process: Process) -> bool:
        pod = process.pod
        if pod is None:
            return self.pod.take(None) and self.namespace.take(None)
        return self.pod.take(pod.name or pod.uid) and self.namespace.take(pod.namespace)

    def take(self, process: Process, library: Library) -> bool:
        """Whether a mapping is asked for."""
        if self.build_ids is not None and library.build_id not in self.build_ids:
            return False
        return self.build_id.take(library.build_id) and self.take_process(process)


def add_filters(parser: Parser) -> None:
    """Add the options."""
    group = parser.add_argument_group(
        "filters", "With commas, or repeated, any of them; with ! in front, as '!nginx', all others."
    )

    def add(name: str, metavar: str, text: str) -> None:
        group.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=text)

    add("unit", "NAME", f"processes of the systemd unit; {_SEARCHED} in its name")
    add("user", "USER", "processes of the user, by name or uid")
    add("comm", "NAME", f"processes of that name; {_SEARCHED}")
    add("exe", "PATH", f"processes that run this executable; {_SEARCHED} in its path")
    add("cgroup", "PATH", f"processes in this cgroup; {_SEARCHED} in its path")
    add("pod", "NAME", f"processes of the pod; {_SEARCHED} in its name, or in its uid where that is all that is known")
    add("namespace", "NAME", f"processes of pods in the namespace; {_SEARCHED} in its name")
    add("build-id", "HEX", "files whose build id begins so")
    add("exports", "SYMBOL", "files that export the symbol; of several, all of them")
    group.add_argument(
        "--match-build-ids",
        metavar="FILE",
        help="files whose build id is in FILE: one at the start of each line; what begins with # is a comment",
    )


def filters_of(args: Namespace) -> Filters:
    """What the options say.

    Raises:
        PatternError: no regular expression.
        UsageError: no build id.
        SowatchError: there is no such user, or the file cannot be read.
    """
    return Filters(
        unit=_terms(args.unit, _search),
        user=_terms(args.user, _is_user),
        comm=_terms(args.comm, _search),
        exe=_terms(args.exe, _search),
        cgroup=_terms(args.cgroup, _search),
        pod=_terms(args.pod, _search),
        namespace=_terms(args.namespace, _search),
        build_id=_terms(args.build_id, _begins),
        build_ids=None if args.match_build_ids is None else _build_ids_in(args.match_build_ids),
    )


def with_exports(rules: Sequence[Rule], words: Iterable[str]) -> tuple[Rule, ...]:
    """The rules for files that export what ``--exports`` says; what is left out is wanted by rules before them."""
    wanted, unwanted = _split(words)
    if not wanted and not unwanted:
        return tuple(rules)
    left_out = [
        Rule(rule.pattern, name=f"{EXCLUDED}{symbol} {rule.name}", kind=rule.kind, exports=(symbol,))
        for symbol in unwanted
        for rule in rules
    ]
    return (*left_out, *(Rule(rule.pattern, name=rule.name, kind=rule.kind, exports=wanted) for rule in rules))


def _terms(words: Iterable[str], make: Callable[[str], Callable[[str], bool]]) -> _Terms:
    wanted, unwanted = _split(words)
    return _Terms(tuple(map(make, wanted)), tuple(map(make, unwanted)))


def _split(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """What is asked for, and what is not. A comma within brackets is one of an expression."""
    wanted: list[str] = []
    unwanted: list[str] = []
    for word in words:
        depth, start = 0, 0
        for at, char in enumerate(word + ","):
            depth += (char in _OPEN) - (char in _CLOSE)
            if char != "," or (depth > 0 and at < len(word)):
                continue
            one = word[start:at].strip()
            start = at + 1
            if one.removeprefix("!"):
                (unwanted if one.startswith("!") else wanted).append(one.removeprefix("!"))
            else:
                raise UsageError(f"{word!r} has an empty word in it. Leave out the comma or the ! that is too much.")
    return wanted, unwanted


def _search(word: str) -> Callable[[str], bool]:
    pattern = compile_pattern(word)
    return lambda value: pattern.search(value) is not None


def _is_user(word: str) -> Callable[[str], bool]:
    if word.isascii() and word.isdigit() and len(word) <= _UID_DIGITS:
        uid = int(word)
    else:
        try:
            uid = pwd.getpwnam(word).pw_uid
        except (KeyError, ValueError) as error:
            raise SowatchError(f"there is no user {word!r} on this host. Give the uid.") from error
    return str(uid).__eq__


def _begins(word: str) -> Callable[[str], bool]:
    digits = word.lower()
    if not re.fullmatch("[0-9a-f]+", digits):
        raise UsageError(f"{word!r} is no build id. Give hexadecimal digits, as `readelf -n` shows them.")
    return lambda value: value.startswith(digits)


def _build_ids_in(path: str) -> frozenset[str]:
    found = set()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if not words or words[0].startswith("#"):
                    continue
                if not _BUILD_ID.fullmatch(words[0].lower()):
                    raise UsageError(
                        f"{path!r}, line {number}: {words[0]!r} is no build id. Begin each line with one, in "
                        "hexadecimal digits, or with #."
                    )
                found.add(words[0].lower())
    except OSError as error:
        raise SowatchError(f"cannot read {path!r}: {error.strerror}. Give a file of build ids.") from error
    return frozenset(found)
