"""`RuleChange`: the rules to watch by, and what goes with them, as one value.

The thread that wants other rules builds it (`RuleChange.changed_to`); the engine's thread applies it as a whole
(`sowatch.engine.publisher.Publisher.change_rules`) and keeps it as the one in force, which any thread may read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from sowatch.engine.file_inspector import Inspector
from sowatch.engine.subscribers import Subscribers
from sowatch.engine.workers import RuleWorker
from sowatch.model.rules import Rule, RuleSet

__all__ = ["RuleChange", "Workers"]


class Workers(NamedTuple):
    """Threads of callbacks: ``running`` have a rule in force, ``retired`` end after what they were offered.

    ``past_errors`` are those of callbacks of workers that have ended, and are in neither.
    """

    running: tuple[RuleWorker, ...] = ()
    retired: tuple[RuleWorker, ...] = ()
    past_errors: int = 0

    @property
    def errors(self) -> int:
        """How many callbacks have raised, those of rules that are gone included."""
        return self.past_errors + sum(one.errors for one in (*self.running, *self.retired))

    def changed_to(self, rules: RuleSet, make: Callable[[Rule, RuleWorker | None], RuleWorker]) -> Workers:
        """Those of other rules: a worker stays if its rule keeps name and callbacks. Begins and retires none.

        Args:
            rules: the new ones.
            make: makes the worker of a rule; the second argument is the one of the same name that has to end first.
        """
        wanted = {rule.name: rule for rule in rules if rule.has_callbacks}
        stay = {
            name: one
            for one in self.running
            if (rule := wanted.get(name := one.rule.name)) and one.rule.calls_the_same_as(rule)
        }
        leave = {one.rule.name: one for one in self.running if one.rule.name not in stay}
        ended = {one for one in self.retired if one.has_ended}
        return Workers(
            (*stay.values(), *(make(rule, leave.get(name)) for name, rule in wanted.items() if name not in stay)),
            (*(one for one in self.retired if one not in ended), *leave.values()),
            self.past_errors + sum(one.errors for one in ended),
        )

    def take_over(self, before: Workers, subscribers: Subscribers) -> None:
        """Retires those of ``before`` that have no rule any more, and begins those that are new."""
        for worker in before.running:
            if worker not in self.running:
                worker.retire()
        for worker in self.running:
            if worker not in before.running:
                worker.begin(subscribers)

    def note_live(self) -> None:
        """From now on what happens is news to those whose first events were of what was mapped already."""
        now_ns = time.monotonic_ns()
        for worker in self.running:
            worker.live_since_ns = min(worker.live_since_ns, now_ns)


class RuleChange(NamedTuple):
    """Rules, what reads files for them (None before the start), and the workers of their callbacks."""

    rules: RuleSet
    inspector: Inspector | None = None
    workers: Workers = Workers()

    def changed_to(
        self,
        rules: RuleSet,
        new_inspector: Callable[[frozenset[str]], Inspector],
        new_worker: Callable[[Rule, RuleWorker | None], RuleWorker],
    ) -> RuleChange:
        """The change from this one, which stays in force until the engine applies the other.

        Args:
            rules: the new ones.
            new_inspector: called with the exports to search for, if what is known of files lacks some of them.
            new_worker: see `Workers.changed_to`.
        """
        inspector = self.inspector
        if inspector is None or rules.exports - self.rules.exports:
            inspector = new_inspector(rules.exports)
        return RuleChange(rules, inspector, self.workers.changed_to(rules, new_worker))
