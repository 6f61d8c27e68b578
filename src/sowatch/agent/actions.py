"""What the rules of the agent do: probes on their files, by configuration, replaced one by one when it changes.

Changed on the main thread; the callbacks run on the threads of their rules.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sowatch.agent.call_tally import CallTally
from sowatch.agent.settings import RuleSettings
from sowatch.engine.workers import ActiveFile
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import ConfigError, EnvironmentFault, SowatchError
from sowatch.model.events import Load, Unload
from sowatch.model.rules import Rule
from sowatch.telemetry import MetricRegistry, Sampler
from sowatch.uprobes import AttachedFile, Attacher, CallCounter
from sowatch.uprobes.features import why_not_attach

__all__ = ["ActionChange", "Actions", "RuleAction"]

LOG = logging.getLogger("sowatch.agent")

#: The kernel's counts are taken this often, whether anybody scrapes or not: their table has an end.
_TAKE_S: Final = 1.0


class _ObjectVersion(NamedTuple):
    """A file that is built anew under its name is another object."""

    inode: int
    changed_ns: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Wish:
    """What makes one action the same as another one: with equal wishes it goes on, and loses no call."""

    settings: RuleSettings
    version: _ObjectVersion | None

    @classmethod
    def of(cls, settings: RuleSettings, place: int) -> _Wish:
        # Pattern, kind and exports are the watcher's: another pattern leaves what it attached to both ways as it is.
        same = RuleSettings(
            name=settings.make().name,
            count=settings.count,
            latency=settings.latency,
            attach=settings.attach,
            linger_s=settings.linger_s,
            prearm=settings.prearm,
        )
        if settings.attach is None:
            return cls(same, None)
        try:
            status = os.stat(settings.attach.object)
        except OSError as error:
            raise ConfigError(
                f"rules[{place + 1}].attach.object",
                f"cannot read {settings.attach.object!r}: {error.strerror}. Give the path of a .bpf.o.",
            ) from error
        return cls(same, _ObjectVersion(status.st_ino, status.st_mtime_ns, status.st_size))


class RuleAction:
    """What one rule does with its files: counts calls, or has programs of its user on them, or both.

    Args:
        settings: of the rule.
        place: of the rule in the configuration, from 0 on, for messages.
        tally: takes the counts.

    Attributes:
        settings: those that it was made for; of its rule's pattern, kind and exports others may be in force.
    """

    def __init__(self, settings: RuleSettings, place: int, tally: CallTally) -> None:
        self.rule = settings.make().name
        self.settings = settings
        self._place = place
        self._tally = tally
        self._is_closed = False
        self.counter: CallCounter | None = None
        self.attacher: Attacher | None = None
        if settings.count:
            self.counter = CallCounter(
                settings.count, is_timed=settings.latency, linger_s=settings.linger_s, prearm=settings.prearm
            )
        if settings.attach is not None:
            probes = settings.attach.probes or None
            self.attacher = Attacher(settings.attach.object, probes, linger_s=settings.linger_s, prearm=settings.prearm)

    @property
    def attachers(self) -> list[Attacher]:
        """One for counting, one for the user's programs."""
        own = [self.attacher] if self.attacher is not None else []
        return [self.counter.attacher, *own] if self.counter is not None else own

    def callbacks(self) -> dict[str, Callable[[ActiveFile], None] | Callable[[Load | Unload], None]]:
        """For the rule; those of one action are equal to each other, and to no other's."""
        found: dict[str, Callable[[ActiveFile], None] | Callable[[Load | Unload], None]] = {
            "on_activate": self.attach,
            "on_deactivate": self.detach,
        }
        if self.counter is not None:
            found |= {"on_load": self._note, "on_unload": self._note}
        return found

    def start(self) -> None:
        """Loads the programs.

        Raises:
            ConfigError: they cannot be loaded; nothing is left of them.
        """
        try:
            for attacher in self.attachers:
                attacher.start()
        except SowatchError as error:
            self.close()
            key = f"rules[{self._place + 1}].{'count' if self.attacher is None else 'attach'}"
            raise ConfigError(key, f"the programs of rule {self.rule!r} cannot be used: {error}") from error
        if self.counter is not None:
            self._tally.follow(self.rule, self.counter)

    def attach(self, file: ActiveFile) -> None:
        """Attaches all to a file, or nothing."""
        done: list[Attacher] = []
        try:
            for attacher in self.attachers:
                attacher.attach(file)
                done.append(attacher)
        except BaseException:
            for attacher in done:
                attacher.detach(file)
            if self._is_closed:  # says nothing of the file, which the next action of the rule may want
                raise EnvironmentFault(f"the action of rule {self.rule!r} has ended. Nothing to do.") from None
            raise
        if self.counter is not None:
            self._tally.note_sites(self.counter)

    def detach(self, file: ActiveFile) -> None:
        """Detaches all from a file, at once or after the linger time."""
        for attacher in self.attachers:
            attacher.detach(file)

    def figures(self) -> dict[str, float]:
        """What `Sampler.follow_attachments` wants."""
        stats = [attacher.stats for attacher in self.attachers]
        found: dict[str, float] = {
            name: sum(getattr(one, name) for one in stats)
            for name in ("expected", "attached", "failed", "repaired", "retries")
        }
        found["failed"] += sum(one.refused for one in stats)
        if self.counter is not None:
            found |= {"lost": self.counter.lost, "untimed": self.counter.untimed}
        return found

    def files(self) -> list[AttachedFile]:
        """Every file that is attached or was refused, with its probes, once for each of `attachers`."""
        return [file for attacher in self.attachers for file in attacher.files()]

    def close(self) -> None:
        """Takes the last counts, and detaches everything. Safe to call again."""
        self._is_closed = True
        if self.counter is not None:
            self._tally.unfollow(self.counter)
        for attacher in self.attachers:
            attacher.close()

    def _note(self, event: Load | Unload) -> None:
        self._tally.note(event)


class ActionChange:
    """A configuration's actions, on their way to be in force: `start`, then `apply`, or `discard`."""

    def __init__(self, actions: Actions, rules: Sequence[RuleSettings]) -> None:
        self._actions = actions
        self.wanted: dict[str, tuple[_Wish, RuleAction]] = {}
        self.new: list[RuleAction] = []
        self.rules: list[Rule] = []
        for place, settings in enumerate(rules):
            if not settings.has_action:
                self.rules.append(settings.make())
                continue
            wish = _Wish.of(settings, place)
            running = actions.running.get(wish.settings.name or "")
            if running is not None and running[0] == wish:
                action = running[1]
            else:
                action = RuleAction(settings, place, actions.tally)
                self.new.append(action)
            self.wanted[action.rule] = (wish, action)
            self.rules.append(settings.make(**action.callbacks()))

    @property
    def is_change(self) -> bool:
        """Whether any action begins or ends."""
        return self.wanted != self._actions.running

    def start(self) -> None:
        """Loads what is new.

        Raises:
            ConfigError: something cannot be loaded; nothing has changed then.
        """
        if self.new and (reason := why_not_attach()) is not None:
            raise ConfigError("rules", f"rule {self.new[0].rule!r} attaches, which cannot be done: {reason}")
        try:
            for action in self.new:
                action.start()
        except BaseException:
            self.discard()
            raise

    def apply(self) -> None:
        """Once the watcher has the rules: ends what is gone."""
        self._actions.take_over(self.wanted, self.new)

    def discard(self) -> None:
        """What is new is not wanted after all. Safe to call again."""
        for action in self.new:
            action.close()


class Actions:
    """All actions of the agent.

    Args:
        metrics: gets their counts.
        sampler: follows their attachments.
        proc: the host's.
    """

    def __init__(self, metrics: MetricRegistry, sampler: Sampler, proc: ProcFs) -> None:
        self.tally = CallTally(metrics, proc)
        #: By name of the rule. Replaced as a whole.
        self.running: Mapping[str, tuple[_Wish, RuleAction]] = {}
        self._metrics = metrics
        self._sampler = sampler
        self._unfollow: dict[RuleAction, Callable[[], None]] = {}
        self._remove_source: Callable[[], None] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def prepare(self, rules: Sequence[RuleSettings]) -> ActionChange:
        """The rules with what they do; nothing is loaded yet.

        Raises:
            ConfigError: an object cannot be read.
        """
        return ActionChange(self, rules)

    def start(self) -> None:
        """Takes counts from now on; not before privileges are given up, as it starts a thread."""
        self._remove_source = self._metrics.add_source(self.tally.take)
        self._thread = threading.Thread(target=self._run, name="sowatch-calls", daemon=True)
        self._thread.start()

    def take_over(self, wanted: Mapping[str, tuple[_Wish, RuleAction]], new: Sequence[RuleAction]) -> None:
        """See `ActionChange.apply`."""
        gone = [action for name, (_, action) in self.running.items() if wanted.get(name, (None, None))[1] is not action]
        self.running = dict(wanted)
        for action in gone:
            if unfollow := self._unfollow.pop(action, None):
                unfollow()  # asks it once more
            action.close()
        for action in new:
            self._unfollow[action] = self._sampler.follow_attachments(action.rule, action.figures)

    def summary(self) -> dict[str, dict[str, float]]:
        """By rule: probes that there should be, that there are, and what could not be attached."""
        found = {name: action.figures() for name, (_, action) in self.running.items()}
        return {name: {key: one[key] for key in ("expected", "attached", "failed")} for name, one in found.items()}

    def close(self) -> None:
        """Detaches everything. Safe to call again."""
        self._stop.set()
        if self._remove_source is not None:
            self._remove_source()
        if self._thread is not None:
            self._thread.join()
        self.take_over({}, ())

    def _run(self) -> None:
        while not self._stop.wait(_TAKE_S):
            try:
                if self.running:
                    self.tally.take()
            except Exception:
                LOG.exception("the counts of calls could not be taken; it is tried again")
