-- What is asked, as views with a parameter `now` (ns since the epoch), so that dashboards have the same answers:
--   SELECT * FROM fleet_coverage(now = toUnixTimestamp64Nano(now64(9)))
-- docs/decisions/0069-fleet-records.md has the rules.

-- Each host with its state, why, and from which version on its rows are in force.
CREATE OR REPLACE VIEW fleet_coverage AS
WITH
    snapshots AS
    (
        SELECT host_id, epoch, snapshot, min(first_version) AS first, max(last_version) AS last, max(end_version) AS ended
        FROM fleet_streams
        WHERE last_version + 2592000000000000 > {now:UInt64}
        GROUP BY host_id, epoch, snapshot
    ),
    newest AS
    (
        -- Of each host: the run that sent last, and its newest snapshot that is complete.
        SELECT
            host_id,
            max(last) AS last_version,
            argMax(epoch, last) AS last_epoch,
            max(ended) AS ended_at,
            argMax(epoch, ended) AS ended_epoch,
            if(ended_at = 0, 0, argMax(first, ended)) AS in_force_from
        FROM snapshots
        GROUP BY host_id
    ),
    arrived AS
    (
        SELECT
            host_id,
            epoch,
            snapshot,
            min(first_version) AS first,
            groupBitmapMerge(seqs) AS received,
            toUInt64(max(last_seq)) + 1 AS made,
            max(previous_records) AS previous
        FROM fleet_streams
        WHERE (host_id, epoch, snapshot) IN
        (
            SELECT host_id, epoch, snapshot
            FROM snapshots
            INNER JOIN newest USING (host_id)
            WHERE last >= in_force_from
        )
        GROUP BY host_id, epoch, snapshot
    ),
    checked AS
    (
        SELECT
            host_id,
            arraySort(groupArray((first, epoch, received, made, previous))) AS streams,
            arrayExists(one -> one.3 != one.4, streams) AS has_gap,
            -- The end of a snapshot is known by the begin of the next one.
            arrayExists((one, next) -> one.2 = next.2 AND next.5 > one.3, arrayPopBack(streams), arrayPopFront(streams))
                AS has_short_end,
            arrayUniq(streams.2) > 1 AS has_other_run
        FROM arrived
        GROUP BY host_id
    ),
    heartbeats AS
    (
        SELECT
            host_id,
            argMax(tuple(host_name, boot_id, agent_version, interval_s, strategy, guarantee, limits, lost, is_repaired,
                unreadable, groups, dropped, epoch), version) AS last,
            max(fleet_hosts.version) AS newest_version,
            -- That of a clock that is ahead is no later than its arrival.
            max(least(version, toUInt64(toUnixTimestamp64Milli(arrived)) * 1000000)) AS heard_at
        FROM fleet_hosts
        GROUP BY host_id
    ),
    refused AS
    (
        SELECT host_id, anyLast(host_name) AS name, max(fleet_refused.version) AS newest_version,
            toUInt64(max(toUnixTimestamp64Milli(arrived))) * 1000000 AS arrived_at
        FROM fleet_refused
        GROUP BY host_id
    )
SELECT
    host_id,
    multiIf(heartbeats.last.1 != '', heartbeats.last.1, refused.name != '', refused.name, host_id) AS host_name,
    if(heartbeats.last.4 = 0, 30, heartbeats.last.4) AS interval_s,
    multiIf(
        refused.arrived_at + 3000000000 * interval_s > {now:UInt64} AND refused.newest_version > refused.arrived_at,
            ('silent', 'its clock is more than five minutes ahead: its records are not taken'),
        refused.arrived_at + 3000000000 * interval_s > {now:UInt64},
            ('silent', 'its clock is more than 29 days behind: its records are not taken'),
        heartbeats.newest_version = 0, ('silent', 'no heartbeat ever'),
        heartbeats.heard_at + 3000000000 * interval_s < {now:UInt64}, ('silent', 'no heartbeat for three intervals'),
        ended_at = 0, ('lossy', 'its first snapshot is not complete'),
        ended_epoch != last_epoch, ('lossy', 'the snapshot of its new agent is not complete'),
        has_other_run OR heartbeats.last.13 != last_epoch,
            ('lossy', 'two agents send as this host, or its clock went back'),
        has_gap OR has_short_end, ('lossy', 'records are missing'),
        in_force_from + 604800000000000 < {now:UInt64}, ('lossy', 'its last complete snapshot is more than a week old'),
        heartbeats.last.8 > 0 AND NOT heartbeats.last.9, ('lossy', 'its agent lost events, which are not repaired'),
        heartbeats.last.10 > 0, ('lossy', 'its agent cannot read all processes'),
        heartbeats.last.6 = 'sampled', ('unsupported', 'its agent polls: what lives shorter is not seen'),
        ('answered', '')) AS verdict,
    verdict.1 AS state,
    verdict.2 AS reason,
    heartbeats.heard_at AS heard_at,
    in_force_from,
    last_version,
    heartbeats.last.2 AS boot_id,
    heartbeats.last.3 AS agent_version,
    heartbeats.last.5 AS strategy,
    heartbeats.last.6 AS guarantee,
    heartbeats.last.7 AS limits,
    heartbeats.last.8 AS lost,
    heartbeats.last.10 AS unreadable,
    heartbeats.last.11 AS groups,
    heartbeats.last.12 AS dropped
FROM
(
    SELECT host_id FROM newest
    UNION DISTINCT SELECT host_id FROM heartbeats
    UNION DISTINCT SELECT host_id FROM refused
) AS ids
LEFT JOIN heartbeats USING (host_id)
LEFT JOIN newest USING (host_id)
LEFT JOIN checked USING (host_id)
LEFT JOIN refused USING (host_id)
WHERE greatest(heartbeats.heard_at, last_version, refused.arrived_at) + 2592000000000000 > {now:UInt64};

-- What each host reported last and has not taken back. Whether it holds is in `state`: see `answer`.
CREATE OR REPLACE VIEW fleet_in_force AS
SELECT reported.*, coverage.host_name AS host_name, coverage.state AS state, coverage.reason AS reason,
    if(coverage.state IN ('answered', 'unsupported'), 'mapped', 'not observed') AS answer
FROM (SELECT * FROM fleet_state FINAL WHERE processes > 0) AS reported
INNER JOIN fleet_coverage(now = {now:UInt64}) AS coverage ON reported.host_id = coverage.host_id
WHERE reported.version >= coverage.in_force_from;
