"""The questions to a fleet: SQL in, `sowatch.fleet.answers.Answer` out. Texts of others are parameters, never SQL.

A question reads the states of the hosts first; every answer names them. Of each host it is `mapped`, `not mapped` or
`not observed`, by the rules of `sowatch.fleet.answers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final

from msgspec import UNSET, Struct, UnsetType

from sowatch.fleet import answers
from sowatch.fleet.answers import Answer, Edge, Host
from sowatch.fleet.asks import Asks, rows
from sowatch.fleet.resolved import Build, Resolved, VulnerableBuilds, may_be, resolve
from sowatch.fleet.targets import Target
from sowatch.model.lines import stamp
from sowatch.model.wire import Pod
from sowatch.model.wire_fleet import (
    FleetAnswer,
    FleetBuild,
    FleetHistory,
    FleetHost,
    FleetHostCount,
    FleetLine,
    FleetMapping,
    FleetRemediation,
    FleetTarget,
    FleetVersion,
    HostAnswer,
    Question,
)

__all__ = ["Fleet", "StaleGroup", "pod_of"]

_COVERAGE: Final = """
SELECT host_id, host_name, state, reason, heard_at, agent_version, strategy, guarantee, limits, lost, dropped,
    unreadable, groups, in_force_from
FROM fleet_coverage(now = {now:UInt64})
ORDER BY host_name, host_id
"""

#: The view joins each row with the state of its host, which is known here: it is enough that a row is new enough.
_HOSTS: Final = """
SELECT host_id, max(version) AS newest
FROM (SELECT * FROM fleet_state FINAL WHERE {condition})
WHERE processes > 0
GROUP BY host_id
"""

_MAPPINGS: Final = """
SELECT host_id, host_name, state, reason, answer, build_id, soname, path, kind, exe, exe_build_id, unit, container,
    pod_uid, pod, namespace, purl, processes, short_lived, pids, listen, stale, stale_since, since, version
FROM fleet_in_force(now = {{now:UInt64}})
WHERE {condition}
ORDER BY host_name, host_id, namespace, pod, container, unit, exe, path, build_id
"""

#: Builds of which some file is stale somewhere: of these only rows are compared with later ones.
_STALE: Final = """
stale != '' AND build_id IN (SELECT DISTINCT build_id FROM fleet_state WHERE stale != '')
"""

_VERSIONS: Final = """
SELECT build_id, uniqExact(path) AS paths, uniqExactIf(host_id, answer = 'mapped') AS hosts,
    uniqExactIf(host_id, answer != 'mapped') AS not_observed, sumIf(processes, answer = 'mapped') AS processes,
    uniqExactIf(host_id, answer = 'mapped' AND stale != '') AS stale_hosts
FROM fleet_in_force(now = {{now:UInt64}})
WHERE {condition}
GROUP BY build_id
"""

#: A row a host: when the first of its groups came and the last one went, by turns. A group that was not ended by a
#: record ended when the first complete snapshot after its last record began, unless the agent's next run sent it, too.
_HISTORY: Final = """
WITH
    spans AS
    (
        SELECT host_id, key, fleet_history.since AS begin, min(first_version) AS first, max(last_version) AS last,
            max(gone_version) AS gone, ifNull(min(nullIf(fleet_history.stale_since, 0)), 0) AS stale_at
        FROM fleet_history
        WHERE build_id IN {builds:Array(String)}
        GROUP BY host_id, key, begin
    ),
    followed AS
    (
        SELECT *, leadInFrame(first) OVER (PARTITION BY host_id, key ORDER BY begin, first
            ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS next
        FROM spans
    ),
    snapshots AS
    (
        SELECT host_id, min(first_version) AS began, max(end_version) AS ended
        FROM fleet_streams
        GROUP BY host_id, epoch, snapshot
        HAVING ended > 0
    ),
    intervals AS
    (
        SELECT host_id, least(begin, first) AS begin, stale_at,
            multiIf(
                gone > 0 AND gone >= last, gone,
                next > 0 AND (snapshots.ended = 0 OR next <= snapshots.ended), next,
                snapshots.began) AS end
        FROM followed
        ASOF LEFT JOIN snapshots ON followed.host_id = snapshots.host_id AND followed.last < snapshots.began
    ),
    changes AS
    (
        SELECT host_id, change.1 AS at, sum(change.2) AS delta
        FROM intervals
        ARRAY JOIN if(end = 0, [(begin, 1)], [(begin, 1), (end, -1)]) AS change
        GROUP BY host_id, at
    ),
    levels AS
    (
        SELECT host_id, at, delta, sum(delta) OVER (PARTITION BY host_id ORDER BY at) AS level
        FROM changes
    ),
    stale AS
    (
        SELECT host_id, min(stale_at) AS stale_since, max(end) AS stale_end, countIf(end = 0) AS stale_open
        FROM intervals
        WHERE stale_at > 0
        GROUP BY host_id
    )
SELECT host_id, edges, stale_since, stale_end, stale_open
FROM
(
    SELECT host_id, arraySort(groupArray((at, level > 0))) AS edges
    FROM levels
    WHERE (level > 0) != (level - delta > 0)
    GROUP BY host_id
) AS hosts
LEFT JOIN stale USING (host_id)
ORDER BY host_id
"""


class StaleGroup(Struct, frozen=True, gc=False):
    """A row of ``fleet_in_force``."""

    host_id: str
    host_name: str
    state: Any
    reason: str
    answer: Any
    build_id: str
    soname: str
    path: str
    kind: str
    exe: str
    exe_build_id: str
    unit: str
    container: str
    pod_uid: str
    pod: str
    namespace: str
    purl: str
    processes: int
    short_lived: int
    pids: list[int]
    listen: str
    stale: str
    stale_since: int
    since: int
    version: int


class _HostRow(Struct, frozen=True, gc=False):
    host_id: str
    newest: int


class _VersionRow(Struct, frozen=True, gc=False):
    build_id: str
    paths: int
    hosts: int
    not_observed: int
    processes: int
    stale_hosts: int


class _HistoryRow(Struct, frozen=True, gc=False):
    host_id: str
    edges: list[tuple[int, int]]
    stale_since: int
    stale_end: int
    stale_open: int


class Fleet:
    """A fleet at one time.

    Args:
        asks: the store.
        now_ns: when it is asked; hosts are silent by then if their last heartbeat is too old.
        expected: names or ids of hosts that should be there.
        vulnerable: finds the builds with a vulnerability; without it none can be asked for.
    """

    def __init__(
        self, asks: Asks, now_ns: int, *, expected: Iterable[str] = (), vulnerable: VulnerableBuilds | None = None
    ) -> None:
        self._asks = asks
        self._now_ns = now_ns
        self._vulnerable = vulnerable
        known = list(rows(asks, _COVERAGE, Host, now=now_ns))
        self.hosts: Sequence[Host] = [*known, *answers.missing_hosts(known, expected)]
        self._by_id = {one.host_id: one for one in self.hosts}
        self._seq = count(1)

    # ---- questions ---------------------------------------------------------------------------------

    def coverage(self) -> Answer:
        """Each host with its state."""
        head = self._head("coverage", [], None, {})
        return Answer(head, (self._host_line(one, None) for one in self.hosts))

    def who(self, target: Target) -> Answer:
        """Who maps it: its groups of processes, then the hosts that it is not known of."""
        found = resolve(self._asks, target, self._vulnerable)
        by_host = self._answers([found])
        head = self._head("who", [found], answers.fleet_answer(by_host.values()), by_host)
        return Answer(head, self._who_lines(found, by_host))

    def remediated(self, targets: Sequence[Target], *, ignore_silent: bool = False) -> Answer:
        """Whether nobody maps any of them; ``ignore_silent``: hosts that are silent do not leave that open."""
        found = [resolve(self._asks, one, self._vulnerable) for one in targets]
        by_host = self._answers(found)
        counting = {
            host_id: answer
            for host_id, answer in by_host.items()
            if not (ignore_silent and self._by_id[host_id].state == "silent")
        }
        head = self._head("remediated", found, answers.fleet_answer(counting.values()), by_host)
        shown = (one for one in self.hosts if by_host[one.host_id] != "not mapped")
        return Answer(head, (self._host_line(one, by_host[one.host_id]) for one in shown))

    def stale(self) -> Answer:
        """Who runs on files that are not the ones on disk any more."""
        return Answer(self._head("stale", [], None, {}), map(self._mapping_line, self.stale_groups()))

    def stale_groups(self) -> Iterator[StaleGroup]:
        """The rows of `stale`."""
        sql = _MAPPINGS.format(condition=_STALE)
        return rows(self._asks, sql, StaleGroup, now=self._now_ns)

    def versions(self, target: Target) -> Answer:
        """How many builds there are of a library, most hosts first."""
        found = resolve(self._asks, target, self._vulnerable)
        head = self._head("versions", [found], None, {})
        sql = _VERSIONS.format(condition=found.condition)
        mapped = {one.build_id: one for one in rows(self._asks, sql, _VersionRow, **self._given(found))}
        return Answer(head, self._version_lines(found, mapped))

    def history(self, target: Target, *, since_ns: int = 0) -> Answer:
        """Which hosts had it mapped from when to when, and how long it took until a replaced one was gone."""
        found = resolve(self._asks, target, self._vulnerable)
        by_host = self._answers([found])
        head = self._head("history", [found], answers.fleet_answer(by_host.values()), by_host)
        return Answer(head, self._history_lines(found, by_host, since_ns))

    def next_seq(self) -> int:
        """The number of the next line."""
        return next(self._seq)

    def head(self, question: Question, answer: HostAnswer | None = None) -> FleetAnswer:
        """A first line of a question without a target."""
        return self._head(question, [], answer, {})

    # ---- hosts -------------------------------------------------------------------------------------

    def _given(self, found: Resolved) -> dict[str, Any]:
        return {"now": self._now_ns, **found.parameters}

    def _hosts_of(self, found: Iterable[Resolved]) -> set[str]:
        """The hosts with a row that is in force."""
        return {
            row.host_id
            for one in found
            for row in rows(self._asks, _HOSTS.format(condition=one.condition), _HostRow, **one.parameters)
            if row.host_id in self._by_id and row.newest >= self._by_id[row.host_id].in_force_from
        }

    def _answers(self, found: Sequence[Resolved]) -> dict[str, HostAnswer]:
        in_force = self._hosts_of(found)
        open_hosts = self._hosts_of(part for one in found for part in may_be(one)) - in_force
        return {
            one.host_id: "not observed"
            if one.host_id in open_hosts
            else answers.host_answer(one.state, is_in_force=one.host_id in in_force)
            for one in self.hosts
        }

    # ---- lines -------------------------------------------------------------------------------------

    def _head(
        self,
        question: Question,
        found: Sequence[Resolved],
        answer: HostAnswer | None,
        by_host: dict[str, HostAnswer],
    ) -> FleetAnswer:
        given = list(by_host.values())
        return FleetAnswer(
            schema=1,
            event="fleet_answer",
            seq=self.next_seq(),
            time=stamp(self._now_ns),
            question=question,
            targets=[FleetTarget(*one.target) for one in found],
            builds=_builds(build for one in found for build in one.builds),
            answer=answer,
            hosts=answers.counted_hosts(self.hosts),
            mapped_host_count=given.count("mapped"),
            not_mapped_host_count=given.count("not mapped"),
            not_observed_host_count=given.count("not observed"),
            unknown_builds=_builds(build for one in found for build in one.unknown)
            if any(one.target.kind in ("cve", "purl") for one in found)
            else UNSET,
        )

    def _who_lines(self, found: Resolved, by_host: dict[str, HostAnswer]) -> Iterator[FleetLine]:
        sql = _MAPPINGS.format(condition=found.condition)
        yield from map(self._mapping_line, rows(self._asks, sql, StaleGroup, **self._given(found)))
        for one in self.hosts:
            if by_host[one.host_id] == "not observed":
                yield self._host_line(one, "not observed")

    def _host_line(self, one: Host, answer: HostAnswer | None) -> FleetHost:
        line = FleetHost(
            schema=1,
            event="fleet_host",
            seq=self.next_seq(),
            host_id=one.host_id,
            host_name=one.host_name,
            state=one.state,
            reason=one.reason,
            heard=_time(one.heard_at),
        )
        if answer is not None:
            return _with(line, answer=answer)
        return _with(
            line,
            agent_version=one.agent_version,
            strategy=one.strategy,
            guarantee=one.guarantee,
            limits=[one.limits] if one.limits else [],
            lost=one.lost,
            dropped=one.dropped,
            unreadable=one.unreadable,
            groups=one.groups,
        )

    def _mapping_line(self, one: StaleGroup) -> FleetMapping:
        return FleetMapping(
            schema=1,
            event="fleet_mapping",
            seq=self.next_seq(),
            host_id=one.host_id,
            host_name=one.host_name,
            state=one.state,
            reason=one.reason,
            answer=one.answer,
            build_id=one.build_id,
            soname=one.soname,
            path=one.path,
            kind=one.kind,
            exe=one.exe,
            exe_build_id=one.exe_build_id,
            unit=one.unit,
            container=one.container,
            pod=pod_of(one),
            purl=one.purl,
            process_count=one.processes,
            short_lived=one.short_lived,
            pids=[pid for pid in one.pids if pid],
            listen=[port for port in one.listen.split(",") if port],
            stale=one.stale,
            stale_since=_time(one.stale_since),
            since=_time(one.since),
            reported=_time(one.version),
        )

    def _version_lines(self, found: Resolved, mapped: dict[str, _VersionRow]) -> Iterator[FleetLine]:
        paths: dict[str, set[str]] = {}
        for build in found.builds:
            paths.setdefault(build.build_id, set()).add(build.path)
        none = _VersionRow("", 0, 0, 0, 0, 0)
        for one in sorted(_builds(found.builds), key=lambda one: (-mapped.get(one.build_id, none).hosts, one.build_id)):
            row = mapped.get(one.build_id, none)
            yield FleetVersion(
                schema=1,
                event="fleet_version",
                seq=self.next_seq(),
                build_id=one.build_id,
                sonames=one.sonames,
                purls=one.purls,
                path_count=row.paths or len(paths[one.build_id]),
                mapped_host_count=row.hosts,
                not_observed_host_count=row.not_observed,
                process_count=row.processes,
                stale_host_count=row.stale_hosts,
            )

    def _history_lines(self, found: Resolved, by_host: dict[str, HostAnswer], since_ns: int) -> Iterator[FleetLine]:
        shown: list[list[Edge]] = []
        durations, still_open = [], 0
        builds = found.parameters["builds"]
        for row in rows(self._asks, _HISTORY, _HistoryRow, builds=builds):
            edges = [Edge(at_ns, bool(is_mapped)) for at_ns, is_mapped in row.edges]
            gone_ns = 0 if edges[-1].is_mapped else edges[-1].at_ns
            if gone_ns and gone_ns < since_ns:
                continue
            shown.append(edges)
            remediated_s = None
            if row.stale_since and not row.stale_open:
                remediated_s = max(0, row.stale_end - row.stale_since) / 1e9
                durations.append(remediated_s)
            still_open += bool(row.stale_open)
            host = self._by_id.get(row.host_id)
            yield FleetHistory(
                schema=1,
                event="fleet_history",
                seq=self.next_seq(),
                host_id=row.host_id,
                host_name=row.host_id if host is None else host.host_name,
                state="silent" if host is None else host.state,
                answer=by_host.get(row.host_id, "not observed"),
                first_mapped=_time(edges[0].at_ns),
                last_gone=_time(gone_ns),
                stale_since=_time(row.stale_since),
                remediated_s=remediated_s,
            )
        yield FleetRemediation(
            schema=1,
            event="fleet_remediation",
            seq=self.next_seq(),
            hosts_over_time=[
                FleetHostCount(stamp(at_ns), hosts) for at_ns, hosts in answers.over_time(shown, since_ns)
            ],
            remediated_host_count=len(durations),
            open_host_count=still_open,
            median_s=answers.quantile(durations, 0.5),
            p95_s=answers.quantile(durations, 0.95),
        )


def _builds(builds: Iterable[Build]) -> list[FleetBuild]:
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for one in builds:
        sonames, purls = found.setdefault(one.build_id, ({}, {}))
        sonames[one.soname or one.path.rpartition("/")[2]] = None
        if one.purl:
            purls[one.purl] = None
    return [FleetBuild(build_id, list(sonames), list(purls)) for build_id, (sonames, purls) in sorted(found.items())]


def pod_of(one: StaleGroup) -> Pod | UnsetType:
    """The pod of a group, if it is in one."""
    if not one.pod_uid:
        return UNSET
    return Pod(one.pod_uid, one.pod or None, one.namespace or None, None)


def _time(at_ns: int) -> str | None:
    return stamp(at_ns) if at_ns else None


def _with(line: FleetHost, **members: Any) -> FleetHost:
    from msgspec.structs import replace

    return replace(line, **members)
