"""Rule and RuleSet: which mapped files are wanted. Pure matching, no I/O.

Rules are ordinary Python regular expressions; they run once per file and path, in user space, and the kernel
remembers the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from sowatch.model.errors import PatternError, UsageError
from sowatch.model.literals import KINDS, Kind

if TYPE_CHECKING:
    from sowatch.engine.workers import ActiveFile
    from sowatch.model.events import Load, Unload

__all__ = ["Decision", "Rule", "RuleSet", "compile_pattern"]


class Decision(Enum):
    """What a RuleSet can say of a path when no single rule is the answer."""

    NO_MATCH = "no rule wants it"
    NEEDS_EXPORTS = "a rule asks for exported symbols, which are not known yet"


@dataclass(frozen=True, eq=False, init=False, repr=False, slots=True)
class Rule:
    r"""One kind of file you want to hear of, and what to do when it comes and goes.

    Args:
        pattern: a Python regular expression (``str``), searched, not anchored, in the path as
            the process sees it. ``None`` or ``""`` matches every file.
        name: how events name the rule. Default: the pattern, or ``all``.
        kind: one or several of ``library``, ``executable``, ``interpreter``, ``other``.
        exports: names that the file must all export as defined dynamic symbols. With exports
            and no pattern the name of the file does not matter.
        on_load, on_unload: called with the `Load` or `Unload` of each process.
        on_activate: called with an open `ActiveFile` when the first process maps the file.
        on_deactivate: called with the same `ActiveFile` (closed) when the last one is gone.

    Callbacks run on the rule's own worker thread, one at a time, in the order things happened.

    Raises:
        PatternError: ``pattern`` is not a regular expression.
        UsageError: an unknown kind, a single text as exports, or a callback that cannot be called or is ``async def``.

    >>> Rule(r"libssl\.so", name="tls").matches_path("/usr/lib/libssl.so.3")
    True
    """

    pattern: str | None
    name: str
    kind: frozenset[Kind]
    exports: frozenset[str]
    on_load: Callable[[Load], object] | None
    on_unload: Callable[[Unload], object] | None
    on_activate: Callable[[ActiveFile], object] | None
    on_deactivate: Callable[[ActiveFile], object] | None
    _search: Callable[[str], Any] | None = field(repr=False)

    def __init__(
        self,
        pattern: str | None = None,
        *,
        name: str | None = None,
        kind: Kind | Iterable[Kind] = "library",
        exports: Iterable[str] = (),
        on_load: Callable[[Load], object] | None = None,
        on_unload: Callable[[Unload], object] | None = None,
        on_activate: Callable[[ActiveFile], object] | None = None,
        on_deactivate: Callable[[ActiveFile], object] | None = None,
    ) -> None:
        kinds: frozenset[Kind] = frozenset([kind]) if isinstance(kind, str) else frozenset(kind)
        for given in sorted(kinds):
            if given not in KINDS:
                raise UsageError(f"unknown kind {given!r}. Use one of: {', '.join(KINDS)}.")
        if not kinds:
            raise UsageError(f"a rule needs at least one kind. Use one of: {', '.join(KINDS)}.")
        if isinstance(exports, str):
            raise UsageError(f"exports is a collection of names, not a text. Write exports=({exports!r},).")
        exports = frozenset(exports)
        for one in exports:
            if not isinstance(one, str):
                raise UsageError(f"a name of exports must be a str, not {type(one).__name__}. Give the symbol's name.")
        if pattern is not None and not isinstance(pattern, str):
            raise UsageError(f"a pattern must be a str, not {type(pattern).__name__}. Pass the expression as text.")
        for called, callback in (
            ("on_load", on_load),
            ("on_unload", on_unload),
            ("on_activate", on_activate),
            ("on_deactivate", on_deactivate),
        ):
            _check_callback(called, callback)
        put = object.__setattr__
        put(self, "pattern", pattern or None)
        put(self, "name", name or pattern or "all")
        put(self, "kind", kinds)
        put(self, "exports", exports)
        put(self, "on_load", on_load)
        put(self, "on_unload", on_unload)
        put(self, "on_activate", on_activate)
        put(self, "on_deactivate", on_deactivate)
        put(self, "_search", compile_pattern(pattern).search if pattern else None)

    def __repr__(self) -> str:
        said: list[str] = [] if self.pattern is None else [repr(self.pattern)]
        if self.name != (self.pattern or "all"):
            said.append(f"name={self.name!r}")
        if self.kind != {"library"}:
            said.append(f"kind={tuple(sorted(self.kind))!r}")
        if self.exports:
            said.append(f"exports={tuple(sorted(self.exports))!r}")
        names = ("on_load", "on_unload", "on_activate", "on_deactivate")
        callbacks = {name: callback for name in names if (callback := getattr(self, name)) is not None}
        said += [f"{name}={getattr(one, '__qualname__', None) or repr(one)}" for name, one in callbacks.items()]
        return f"Rule({', '.join(said)})"

    @property
    def has_callbacks(self) -> bool:
        """Whether the rule needs a worker thread."""
        return any((self.on_load, self.on_unload, self.on_activate, self.on_deactivate))

    def calls_the_same_as(self, other: Rule) -> bool:
        """Whether both have the same name and the same callbacks, so that one can go on with the other's work."""
        return self._works() == other._works()

    def _works(self) -> tuple[Any, ...]:
        return (self.name, self.on_load, self.on_unload, self.on_activate, self.on_deactivate)

    def matches_path(self, path: str) -> bool:
        """Whether the pattern is found in ``path`` (surrogate escapes stand for raw bytes)."""
        return self._search is None or self._search(path) is not None


def _check_callback(name: str, callback: object) -> None:
    if callback is not None and not callable(callback):
        raise UsageError(f"{name} must be a function, not {type(callback).__name__}. Pass what is to be called.")
    if iscoroutinefunction(callback) or iscoroutinefunction(getattr(callback, "__call__", None)):  # noqa: B004
        raise UsageError(
            f"{name} is an `async def`, and callbacks run on a thread without an event loop. Iterate `awatch`, or "
            "pass a function that calls asyncio.run_coroutine_threadsafe."
        )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression that a user has written.

    Raises:
        PatternError: it is none, or too large.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PatternError(pattern, error.msg, error.pos) from error
    except (RecursionError, OverflowError, MemoryError) as error:
        raise PatternError(pattern, "too large or too deeply nested", None) from error


class RuleSet:
    """Rules in order; the first that matches wins.

    >>> rules = RuleSet([Rule("libssl", name="tls"), Rule(None, name="rest")])
    >>> rules.match("/usr/lib/libz.so.1", "library").name
    'rest'
    """

    __slots__ = ("_rules",)

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self._rules = tuple(rules) or (Rule(),)
        for rule in self._rules:
            if not isinstance(rule, Rule):
                raise UsageError(f"expected a Rule, got {type(rule).__name__}. Write Rule({rule!r}).")
        names = [rule.name for rule in self._rules]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two rules are named {name!r}. Give each rule its own name=.")

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def named(self, name: str) -> Rule | None:
        """The rule of that name."""
        return next((rule for rule in self._rules if rule.name == name), None)

    @property
    def exports(self) -> frozenset[str]:
        """Every symbol that some rule asks for."""
        return frozenset[str]().union(*(rule.exports for rule in self._rules))

    @property
    def needs_exports(self) -> bool:
        """Whether any rule asks for exported symbols."""
        return any(rule.exports for rule in self._rules)

    @property
    def wants_images(self) -> bool:
        """Whether any rule asks for executables or interpreters, which exec maps, not mmap."""
        return any(rule.kind & {"executable", "interpreter"} for rule in self._rules)

    @property
    def everything(self) -> Rule | None:
        """The last rule if it wants every library, executable and interpreter, whatever they export."""
        last = self._rules[-1]
        is_it = last.pattern is None and not last.exports and last.kind >= {"library", "executable", "interpreter"}
        return last if is_it else None

    def could_match(self, path: str) -> bool:
        """Whether some rule's pattern is found in ``path``, whatever the kind and the exports.

        This is what the kernel's verdict rests on: a file for which this is false is dropped
        there, for every process.
        """
        return any(rule.matches_path(path) for rule in self._rules)

    def match(self, path: str, kind: str, exports: frozenset[str] | None = None) -> Rule | Decision:
        """The first rule that wants the file, or why there is none.

        Args:
            path: as the process sees it.
            kind: what the file is to the process, one of `KINDS`.
            exports: the file's exported symbols, ``None`` while they are not known.
        """
        for rule in self._rules:
            if kind not in rule.kind or not rule.matches_path(path):
                continue
            if rule.exports:
                if exports is None:
                    return Decision.NEEDS_EXPORTS
                if not rule.exports <= exports:
                    continue
            return rule
        return Decision.NO_MATCH
