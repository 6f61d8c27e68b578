"""What the agent's rules have attached, as explanations and the page have it. Reads only."""

from __future__ import annotations

import time
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from sowatch.agent.actions import Actions, RuleAction
from sowatch.agent.http_flows import HttpFlows
from sowatch.explain import AttachmentReport, PathReport, ProbeReport, ProcessReport, attachment_line
from sowatch.model.errors import SowatchError
from sowatch.model.identity import FileId
from sowatch.model.lines import SCHEMA, library_dict
from sowatch.uprobes import AttachedFile
from sowatch.watcher.watcher import Watcher

__all__ = ["Attachments"]


class Attachments:
    """Answers from the actions as they are now. All methods may be called from any thread.

    Args:
        actions: of the agent.
        flows: of the agent.
        watcher: whose rules they belong to.
    """

    def __init__(self, actions: Actions, flows: HttpFlows, watcher: Watcher) -> None:
        self._actions = actions
        self._flows = flows
        self._watcher = watcher

    def added_to(self, report: ProcessReport | PathReport) -> ProcessReport | PathReport:
        """The report with what is attached to its files."""
        found = self._by_file()
        if isinstance(report, PathReport):
            ids = dict.fromkeys(one.id for one in report.ids)
            return replace(report, attachments=tuple(each for one in ids for each in found.get(one, ())))
        mappings = [replace(one, attachments=tuple(found.get(one.library.id, ()))) for one in report.mappings]
        return self._flows.explained(replace(report, mappings=tuple(mappings)))

    def explain_rule(self, name: str) -> dict[str, Any]:
        """What a rule wants, what it does, to which files, and what it could not do.

        Raises:
            SowatchError: there is no such rule.
        """
        rule = next((one for one in self._watcher.rules if one.name == name), None)
        if rule is None:
            known = ", ".join(one.name for one in self._watcher.rules)
            raise SowatchError(f"there is no rule {name!r}. Use one of: {known}.")
        now_s = time.monotonic()
        action = self._action(name)
        calls = [] if action is None or action.counter is None else self._calls(action)
        return {
            "schema": SCHEMA,
            "event": "explain",
            "target": "rule",
            "rule": rule.name,
            "pattern": rule.pattern,
            "kind": sorted(rule.kind),
            "kinds": sorted(rule.kind),
            "exports": sorted(rule.exports),
            "action": None if action is None else _action_dict(action),
            "files": [] if action is None else [_file_dict(name, file) for file in action.files()],
            "calls": calls,
            "functions": calls,
            "seq": 1,
            "blocked": [
                {"path": one.sample_path, "reason": one.reason, "seconds_left": round(one.expires_s - now_s, 3)}
                for one in self._watcher.registry.blocked()
                if one.rule == name
            ],
        }

    def _action(self, name: str) -> RuleAction | None:
        found = self._actions.running.get(name)
        return None if found is None else found[1]

    def _by_file(self) -> dict[FileId, list[AttachmentReport]]:
        found: dict[FileId, list[AttachmentReport]] = {}
        for name, (_, action) in self._actions.running.items():
            for file in action.files():
                found.setdefault(file.library.id, []).append(_report(name, file))
        return found

    def _calls(self, action: RuleAction) -> list[dict[str, Any]]:
        sums = self._actions.tally.sums()
        return [
            {"path": file.library.path, **one._asdict()}
            for file in action.files()
            for one in sums.get(file.library.id, ())
        ]


def _action_dict(action: RuleAction) -> dict[str, Any]:
    settings = action.settings
    attach = settings.attach
    return {
        "count": list(settings.count),
        "latency": settings.latency,
        "attach": None if attach is None else {"object": attach.object, "probes": dict(attach.probes)},
        "linger_s": settings.linger_s,
        **action.figures(),
    }


def _file_dict(rule: str, file: AttachedFile) -> dict[str, Any]:
    return {"library": library_dict(file.library), **to_builtins(attachment_line(_report(rule, file)))}


def _report(rule: str, file: AttachedFile) -> AttachmentReport:
    probes = [
        ProbeReport(one.symbol, one.program, one.is_return, one.state, one.reason, one.offset)
        for one in file.attachments
    ]
    return AttachmentReport(rule, file.state, file.reason, file.users, file.is_lingering, tuple(probes))
