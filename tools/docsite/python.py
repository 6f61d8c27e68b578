"""The reference of what programs import, made of the docstrings."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Final

__all__ = ["GROUPS", "markdown", "undocumented"]

#: By page and heading the names, with the module that they are imported from.
GROUPS: Final[dict[str, dict[str, tuple[str, tuple[str, ...]]]]] = {
    "sowatch": {
        "Watching": ("sowatch", ("watch", "awatch", "Watcher", "Rule", "ActiveFile", "Config", "Subscription")),
        "Events": (
            "sowatch",
            (
                "Event",
                "LibraryEvent",
                "Load",
                "Unload",
                "Activate",
                "Deactivate",
                "Stale",
                "Renewed",
                "Ready",
                "Lost",
                "Repaired",
                "Stopped",
                "to_json",
                "decode",
            ),
        ),
        "Processes and files": ("sowatch", ("Process", "ProcessId", "Library", "FileId")),
        "What is mapped": ("sowatch", ("Mapped", "MappedFacts", "Staleness", "facts_of", "FileRegistry", "Stats")),
        "Audit and explanations": ("sowatch", ("AuditReport", "Difference", "ProcessReport", "PathReport")),
        "Processes as they come and go": ("sowatch", ("ProcessMonitor", "process_monitor")),
        "Errors": ("sowatch", ("SowatchError", "EnvironmentFault", "LoadAttempt")),
        "Kinds of errors": (
            "sowatch.model.errors",
            (
                "NotPermitted",
                "LoadError",
                "LibbpfMissing",
                "PidNamespaceError",
                "UsageError",
                "PatternError",
                "ConfigError",
                "ProcRootError",
                "DecodeError",
                "BpfError",
                "ProgramRefused",
                "TracefsNotMounted",
                "CompileError",
                "FileRefused",
                "RegistryError",
                "ProcessGone",
                "RegistryStopped",
                "SinkError",
            ),
        ),
    },
    "uprobes": {
        "BPF programs of your own": (
            "sowatch.uprobes",
            (
                "Attacher",
                "Probe",
                "all_of",
                "best_effort",
                "AttachedFile",
                "Attachment",
                "AttacherStats",
                "Failure",
                "Site",
            ),
        ),
        "Calls": ("sowatch.uprobes", ("CallCounter", "Calls", "CallFormat", "parse_function", "Call")),
    },
    "http": {
        "Taps": ("sowatch.http.taps", ("HttpTap", "HttpFlow", "CAPTURE_BYTES")),
        "Flows": ("sowatch.http", ("Flow", "FlowStats", "FlowTable")),
    },
}


def markdown(page: str) -> str:
    """A section for each group of a page, with everything that is in it."""
    if missing := undocumented():
        raise LookupError(f"no page has {', '.join(missing)}. Name it in GROUPS of tools/docsite/python.py.")
    made = []
    for heading, (module, names) in GROUPS[page].items():
        made.append(f"## {heading}")
        made += [_entry(module, name) for name in names]
    return "\n\n".join(made) + "\n"


def undocumented() -> list[str]:
    """What is public and on no page."""
    entries = [entry for page in GROUPS.values() for entry in page.values()]
    documented = {getattr(import_module(module), name) for module, names in entries for name in names}
    return sorted(
        f"{module}.{name}"
        for module in {module for module, _ in entries}
        for name in import_module(module).__all__
        if getattr(import_module(module), name, None) not in documented
    )


def _entry(module: str, name: str) -> str:
    value = getattr(import_module(module), name)
    directive = "autoclass" if inspect.isclass(value) else "autofunction" if inspect.isfunction(value) else "autodata"
    lines = [f"### {name}", "", "```{eval-rst}", f".. {directive}:: {module}.{name}"]
    if directive == "autodata":
        lines.append("   :no-value:")
    return "\n".join([*lines, "```"])
