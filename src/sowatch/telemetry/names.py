"""Every metric of sowatch: its name, kind, labels and meaning. Imports nothing of the package.

`document` gives docs/metrics.md, and a test compares the two. Names have dots here, as in the origin;
`prometheus_name` says what Prometheus calls them.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from msgspec import Struct

__all__ = ["CATALOGUE", "Definition", "document", "prometheus_name"]


class Definition(Struct, frozen=True):
    """One metric.

    Attributes:
        origin: what the system that sowatch comes from called it, if it had it.
        convention: its name in OpenTelemetry's semantic conventions, by which OTLP gets it.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    origin: str | None = None
    convention: str | None = None


_all: list[Definition] = []


def _define(
    kind: Literal["counter", "gauge", "histogram"],
    name: str,
    text: str,
    *labels: str,
    origin: str | None = None,
    convention: str | None = None,
) -> Definition:
    made = Definition(name, kind, text, labels, origin, convention)
    _all.append(made)
    return made


STRATEGY: Final = _define(
    "gauge",
    "strategy.info",
    "1 for the strategy and the hooks in use, and what they guarantee.",
    "strategy",
    "hooks",
    "guarantee",
)
BUILD: Final = _define("gauge", "build.info", "1 for the version that runs.", "version")

BPF_MAP_BYTES: Final = _define(
    "gauge",
    "bpf.map_bytes",
    "Memory of this process's BPF maps, as the kernel counts it; since Linux 5.11 it counts towards the limit of "
    "memory of the service or the container.",
)

HITS: Final = _define("counter", "watcher.hits", "Records that the kernel side sent.", origin="usm.so_watcher.hits")
MATCHES: Final = _define("counter", "watcher.matches", "Loads that a rule matched.", origin="usm.so_watcher.matches")
UNLOADS: Final = _define("counter", "watcher.unloads", "Unloads of what a rule matched.")
EVENTS: Final = _define("counter", "watcher.events", "Events published, control events among them.")
PROCESSES: Final = _define("gauge", "watcher.processes", "Processes that have something mapped that a rule matched.")
LIBRARIES: Final = _define("gauge", "watcher.libraries", "Files mapped somewhere that a rule matched.")
MAPPINGS: Final = _define("gauge", "watcher.mappings", "Pairs of a process and a file that it has mapped.")
LOST: Final = _define(
    "counter",
    "watcher.lost",
    "What did not get through, by where: queue is events that slow readers missed, sinks included; the others "
    "are the kernel side's, throttled being records of a process that floods, and unread what could not be read for "
    "want of descriptors or memory.",
    "where",
)
REPAIRS: Final = _define("counter", "watcher.repairs", "Losses in the kernel made good by a full scan.")
IS_REPAIRED: Final = _define("gauge", "watcher.repaired", "1 while every loss in the kernel is made good, else 0.")
UNREAD: Final = _define(
    "gauge", "watcher.unread", "Processes whose mappings cannot be read now, because the kernel does not answer."
)
REREADS: Final = _define(
    "counter", "watcher.rereads", "Processes read again because other threads might have interfered."
)
UNRESOLVED: Final = _define(
    "counter", "watcher.unresolved", "Loads that a rule on exports could not judge, because the file was not readable."
)
PARTIAL: Final = _define(
    "counter",
    "watcher.partial",
    "Loads of files that contradict themselves or pass a limit of work, so that build id, soname or exports may be "
    "missing.",
)
CALLBACK_ERRORS: Final = _define("counter", "watcher.callback_errors", "Exceptions that callbacks of rules raised.")
POD_LOOKUPS: Final = _define("counter", "pods.lookups", "Questions to the container runtime for the names of pods.")
POD_LOOKUP_FAILURES: Final = _define(
    "counter", "pods.lookup_failures", "Of these, those that it did not answer; pods have no names until it does."
)
AUDITS: Final = _define("counter", "audit.runs", "Comparisons of the map with /proc that ran to their end.")
AUDIT_DIFFERENCES: Final = _define("gauge", "audit.differences", "Differences that the last comparison found.")
AUDIT_SECONDS: Final = _define("gauge", "audit.duration_seconds", "Time that the agent's last comparison took.")
AUDIT_TIME: Final = _define(
    "gauge", "audit.timestamp_seconds", "When the agent's last comparison ended, in seconds since the epoch."
)

STALE_PROCESSES: Final = _define(
    "gauge",
    "stale.processes",
    "Processes that have a file mapped which is no longer the one on disk. By is unit, container, host (in neither of "
    "both) or other (of all beyond the 50 names with the most), name the unit or the container's id.",
    "by",
    "name",
)
STALE_UNKNOWN: Final = _define(
    "gauge",
    "stale.unknown_mappings",
    "Mapped files of which it cannot be determined whether they are the ones on disk.",
)
STALE_SECONDS: Final = _define(
    "gauge", "stale.duration_seconds", "Time that the last comparison of mapped files with the disk took."
)
STALE_TIME: Final = _define(
    "gauge", "stale.timestamp_seconds", "When that comparison ended, in seconds since the epoch."
)

STALE_REMEDIATION_SECONDS: Final = _define(
    "histogram",
    "stale.remediation_seconds",
    "Time from the moment a file was replaced or deleted to the end of the last process that had it mapped; of files "
    "that were replaced before the agent started only where the disk shows when.",
)
STALE_OLDEST: Final = _define(
    "gauge",
    "stale.oldest_timestamp_seconds",
    "Since when the file runs that was replaced the longest time ago, in seconds since the epoch; 0 if none does.",
)

VULNERABLE_PROCESSES: Final = _define(
    "gauge",
    "vulnerable.processes",
    "Processes that have a file mapped which is affected, by the vulnerability and the package; of the 100 pairs with "
    "the most processes.",
    "id",
    "package",
)
VULNERABLE_LEFT_OUT: Final = _define(
    "gauge", "vulnerable.left_out", "Pairs of a vulnerability and a package beyond these."
)
VULNERABLE_ANY: Final = _define(
    "gauge", "vulnerable.affected_processes", "Processes that have any affected file mapped, each once."
)
VULNERABLE_UNKNOWN: Final = _define(
    "gauge",
    "vulnerable.unknown_files",
    "Mapped files of which it is unknown whether they are affected, by why: package (it is not known) or data (they "
    "have nothing of its distribution, or its version cannot be compared).",
    "why",
)
VULNERABLE_ADVISORIES: Final = _define("gauge", "vulnerable.advisories", "Advisories that were read.")
VULNERABLE_PROBLEMS: Final = _define("gauge", "vulnerable.problems", "What of the data could not be read.")
VULNERABLE_DATA_VALID: Final = _define(
    "gauge",
    "vulnerable.data_valid",
    "1 if the data of the configuration are in force, 0 if they could not be read, or not yet.",
)
VULNERABLE_DATA_TIME: Final = _define(
    "gauge",
    "vulnerable.data_timestamp_seconds",
    "When the advisory that was changed last was changed, in seconds since the epoch: how old the data are.",
)
VULNERABLE_TIME: Final = _define(
    "gauge", "vulnerable.timestamp_seconds", "When what is mapped was judged last, in seconds since the epoch."
)
VULNERABLE_SECONDS: Final = _define("gauge", "vulnerable.duration_seconds", "Time that this took.")

CALLBACK_SECONDS: Final = _define(
    "histogram", "callback.duration_seconds", "Time that callbacks of rules took.", "rule", "callback"
)
LOAD_TO_CALLBACK_SECONDS: Final = _define(
    "histogram",
    "load_to_callback.seconds",
    "Time from a load in the kernel to the call of the rule's callback; loads of the snapshot are left out.",
    "rule",
    "callback",
)
ATTACH_SECONDS: Final = _define(
    "histogram",
    "attach.duration_seconds",
    "Time that activations took: opening the file and on_activate.",
    "rule",
    origin="uprobe_attacher.binary_inspection_duration_nanoseconds",
)

CALLS: Final = _define(
    "counter",
    "calls",
    "Calls of functions that a rule counts, in all processes; library is its soname, else its file name.",
    "library",
    "build_id",
    "symbol",
    "container",
)
CALL_SECONDS: Final = _define(
    "histogram",
    "calls.duration_seconds",
    "Time that these calls took; calls left by longjmp or an exception have none.",
    "library",
    "build_id",
    "symbol",
    "container",
)
CALLS_LOST: Final = _define(
    "counter", "calls.lost", "Calls that are in no count, because the kernel's table was full.", "rule"
)
CALLS_UNTIMED: Final = _define(
    "counter", "calls.untimed", "Calls that were counted and not timed: one thread had too many under way.", "rule"
)
#: By the field of `sowatch.uprobes.AttacherStats`.
ATTACHMENTS: Final = {
    field: _define("counter" if field in ("repaired", "retries") else "gauge", f"attachments.{field}", text, "rule")
    for field, text in {
        "expected": "Probes that a rule's files should have.",
        "attached": "Probes that they have.",
        "failed": "Functions and files of a rule that could not be attached, blocked files among them.",
        "repaired": "Probes that the kernel did not have any more and that were attached anew.",
        "retries": "Attempts to attach after a failure that was the surroundings'.",
    }.items()
}

#: Attributes of OpenTelemetry's conventions; what is not known, or is one of too many, is left out.
_HTTP_LABELS: Final = (
    "http.request.method",
    "http.response.status_code",
    "http.route",
    "server.address",
    "server.port",
    "url.scheme",
    "network.protocol.version",
    "error.type",
    "container.id",
)
HTTP_SERVER_SECONDS: Final = _define(
    "histogram",
    "http.server.request.duration_seconds",
    "Time from the first byte of a request that passed a TLS library to the last of its response, where it was served; "
    "the route is the path with its variable parts as `*`. What is one of too many is under the route `other`.",
    *_HTTP_LABELS,
    convention="http.server.request.duration",
)
HTTP_CLIENT_SECONDS: Final = _define(
    "histogram",
    "http.client.request.duration_seconds",
    "The same where the request was made.",
    *_HTTP_LABELS,
    convention="http.client.request.duration",
)
#: By the key of `sowatch.agent.http_flows.HttpFlows.figures`.
HTTP: Final = {
    field: _define("counter", f"http.{field}", text)
    for field, text in {
        "flows": "Requests with their responses that passed TLS libraries.",
        "incomplete": "Of these, those whose end was not seen.",
        "joined_late": "Responses whose request passed before the probes came, and connections joined in the middle.",
        "resyncs": "Losses of framing, each followed by a search for the next message.",
        "truncated": "Calls whose bytes were not captured where they were needed.",
        "unknown_fields": "HTTP/2 fields that were sent before the probes came.",
        "unknown_peers": "Flows whose socket was never seen.",
        "undecoded": "Connections that have shown no HTTP.",
    }.items()
}
HTTP_LOST: Final = _define(
    "counter",
    "http.lost",
    "What is in no flow, by where: ring, unreadable and connections are calls that the programs could not send, read "
    "or keep apart; ends is ends of connections that they could not send, whose last flow waits for the process's end; "
    "table is connections and requests given up for want of space; stream is flows that are counted and were not "
    "published, because too many waited.",
    "where",
)
#: By the key of `sowatch.agent.http_flows.HttpFlows.figures` the place.
HTTP_LOST_PLACES: Final = {
    "lost": "ring",
    "unreadable": "unreadable",
    "no_room": "connections",
    "lost_ends": "ends",
    "dropped": "table",
    "unpublished": "stream",
}

#: By the field of `registry.RegistryStats`.
FILE_REGISTRY: Final = {
    field: _define(
        "gauge" if field.startswith("total_") else "counter",
        f"file_registry.{field}",
        text,
        origin=None if field == "environment_faults" else f"usm.file_registry.{field}",
    )
    for field, text in {
        "total_files": "Files that some process holds, counted for each rule.",
        "total_pids": "Processes that hold a file of some rule.",
        "registered": "Activations that succeeded.",
        "already_registered": "Processes that came to a file that was held already.",
        "hook_failed": "Activations that failed and blocked their file.",
        "environment_faults": "Activations that failed for a reason outside the file, which was not blocked.",
        "blocked": "Activations refused because the file was blocked.",
        "unregistered": "Deactivations that ran.",
        "unregister_errors": "Releases of a file by a process that did not hold it.",
        "unregister_failed_cb": "Deactivations whose callback raised.",
        "unregister_path_id_not_found": "Releases of a file that nobody holds.",
    }.items()
}

#: By the field of `processes.ProcessMonitorStats`.
PROCESS_MONITOR: Final = {
    field: _define(
        "gauge" if field == "processes" else "counter",
        f"process_monitor.{name}",
        text,
        origin=f"usm.process.monitor.{origin}" if origin else None,
    )
    for field, (name, text, origin) in {
        "events": ("events", "Process events received.", "events"),
        "exec": ("exec", "Executions of programs.", "exec"),
        "fork": ("fork", "Forks.", None),
        "exit": ("exit", "Ends of processes.", "exit"),
        "callbacks": ("callback_executed", "Calls of subscribers.", "callback_executed"),
        "callback_errors": ("callback_errors", "Calls of subscribers that raised.", None),
        "lost_kernel": ("lost_kernel", "Events that the kernel side could not send.", None),
        "lost_queue": (
            "channel_is_full",
            "Events that found the queue full; they are found again.",
            "process_exec_channel_is_full, process_exit_channel_is_full",
        ),
        "repairs": ("repairs", "Scans of /proc that made a loss good.", None),
        "scan_failed": (
            "process_scan_failed",
            "Scans of /proc that failed; each is tried again.",
            "process_scan_failed",
        ),
        "feed_errors": (
            "restart",
            "Failures of the feed, each followed by opening it again.",
            "restart, reinit_failed",
        ),
        "processes": ("processes", "Processes known.", None),
    }.items()
}

SINK_EVENTS: Final = _define("counter", "sink.events", "Events that a sink has delivered.", "sink")
SINK_LOST: Final = _define(
    "counter",
    "sink.lost",
    "Events that a sink missed because it was slow, dead or full; never lost in the kernel.",
    "sink",
)
SINK_ERRORS: Final = _define("counter", "sink.errors", "Deliveries that failed; each is tried again.", "sink")
SINK_WAITING: Final = _define("gauge", "sink.waiting", "Events that wait in a sink's queue.", "sink")
SINK_UP: Final = _define("gauge", "sink.up", "1 if a sink's last delivery succeeded, else 0.", "sink")

EXPORTER_PUSHES: Final = _define("counter", "exporter.pushes", "Deliveries of metrics that succeeded.", "exporter")
EXPORTER_ERRORS: Final = _define("counter", "exporter.errors", "Deliveries of metrics that failed.", "exporter")

#: By the key of `sowatch.agent.fleet_feed.Feed.figures`.
FLEET: Final = {
    field: _define("gauge" if field in ("waiting", "up", "groups", "left_out") else "counter", f"fleet.{field}", text)
    for field, text in {
        "records": "Records that the receiver of the fleet took.",
        "lost": "Records that were made and did not arrive; everything is sent anew then.",
        "errors": "Requests to the receiver that failed, and faults of what makes them; each is tried again.",
        "waiting": "Records that were made and did not arrive yet.",
        "up": "1 if the last request succeeded, else 0.",
        "groups": "Groups of processes that have the same file mapped.",
        "left_out": "Mappings that are in no group, as there are too many groups; the host counts as lossy.",
        "short_lived": "Mappings that were over within a second, and are in no group.",
    }.items()
}

#: Of `sowatch fleet receive`.
RECEIVER_REQUESTS: Final = _define(
    "counter", "receiver.requests", "Requests to /v1/logs that were answered, by status of HTTP.", "status"
)
RECEIVER: Final = {
    field: _define("gauge" if field.startswith(("waiting", "last")) else "counter", f"receiver.{field}", text)
    for field, text in {
        "records": "Records that were stored.",
        "rejected": "Records that could not be taken, of requests whose others were.",
        "bytes": "Bytes of the rows that were stored, as they were inserted.",
        "inserts": "Inserts that succeeded; requests that come together are one.",
        "failures": "Inserts that failed, those of a full disk among them.",
        "insert_seconds": "Seconds that inserts took.",
        "waiting_records": "Records that wait for their insert.",
        "waiting_bytes": "Bytes of their rows.",
        "last_insert_seconds": "Seconds since the last insert that succeeded; -1 before the first.",
    }.items()
}

CONFIG_LOADS: Final = _define(
    "counter", "config.loads", "Configurations that were read, by result: ok or invalid.", "result"
)
CONFIG_VALID: Final = _define(
    "gauge", "config.valid", "1 if the configuration is the one in force, 0 if it cannot be used and an older one is."
)

CLIENTS_CUT_OFF: Final = _define(
    "counter", "agent.clients_cut_off", "Clients of /events that were too far behind and were cut off with `lost`."
)

OVERFLOW: Final = _define(
    "counter",
    "telemetry.overflow",
    "Uses of a metric that could not take another set of labels and went to its overflow series.",
    "metric",
)
SAMPLE_ERRORS: Final = _define(
    "counter", "telemetry.sample_errors", "Sources of metrics that could not be read; the metrics kept what they had."
)

#: Every metric by its name.
CATALOGUE: Final = {one.name: one for one in _all}


def prometheus_name(name: str, kind: str) -> str:
    """The name that Prometheus and OpenMetrics show: ``sowatch_``, no dots, counters end with ``_total``."""
    text = "sowatch_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
    return f"{text}_total" if kind == "counter" else text


def document() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -c 'from sowatch.telemetry.names import document; print(document(), end=\"\")'`;",
        "a test compares the two.",
        "",
        "Names are those of Prometheus and OpenMetrics. StatsD gets them with a dot after `sowatch`, OTLP with",
        "dots throughout and without `_total` (`sowatch.watcher.hits`), and the two of HTTP requests by their names in",
        "OpenTelemetry's conventions (`http.server.request.duration`). Times are in seconds. No metric has a pid or a",
        "path as a label, but for the reduced path of HTTP requests. Dots in labels are `_` for Prometheus. One metric",
        "takes 200 sets of labels; what comes after them goes to one series with",
        '`overflow="true"`, and `sowatch_telemetry_overflow_total` counts it.',
        "",
        "| metric | kind | labels | meaning | in the origin |",
        "|---|---|---|---|---|",
    ]
    for one in CATALOGUE.values():
        labels = ", ".join(f"`{label}`" for label in one.labels)
        origin = f"`{one.origin}`" if one.origin else ""
        lines.append(f"| `{prometheus_name(one.name, one.kind)}` | {one.kind} | {labels} | {one.help} | {origin} |")
    return "\n".join(lines) + "\n"
