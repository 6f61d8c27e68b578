-- Records of sowatch agents, from otel_logs to what is asked. docs/decisions/0069-fleet-records.md says what they mean.
--
-- fleet_incoming takes each attribute out of its map once and keeps nothing; the tables behind it are fed by views of it.
-- Rows are replaced by those of a greater version, in whatever order they arrive, and one that arrives twice changes
-- nothing. Ask with FINAL or argMax: merges remove what was replaced, some time.

CREATE TABLE IF NOT EXISTS fleet_incoming
(
    event LowCardinality(String),        -- state, mapped, unmapped; snapshot_begin, snapshot_end, heartbeat
    version UInt64,                      -- the agent's clock, ns since the epoch, strictly rising within its run
    host_id String,
    host_name String,
    boot_id String,
    agent_version LowCardinality(String),
    epoch UInt64,                        -- when the agent started, ns since the epoch
    snapshot UInt32,                     -- rises whenever the agent sends everything anew; from 1
    seq UInt32,                          -- counts the records of one snapshot, from 0, without a gap
    key UInt64,                          -- what is mapped by whom, within the host
    build_id String,                     -- GNU build id in hex, else `htlhash:...`, else empty
    soname String,
    path String,
    kind LowCardinality(String),
    exe String,
    exe_build_id String,
    container String,
    pod_uid String,
    pod String,
    namespace String,
    unit String,
    package String,
    package_version String,
    source_package String,
    purl String,
    identified_by LowCardinality(String),
    processes UInt32,
    short_lived UInt64,
    pids Array(UInt32),
    listen String,
    stale LowCardinality(String),
    stale_since UInt64,
    since UInt64,                        -- when the group got its first process, or the agent found it; ns since the epoch
    records UInt32,                      -- of snapshot_end: how many states it has; of snapshot_begin: records of the one before
    interval_s UInt32,                   -- of heartbeat, as all that follows
    strategy LowCardinality(String),
    guarantee LowCardinality(String),
    limits String,
    lost UInt64,
    repaired UInt64,
    is_repaired UInt8,
    unreadable UInt32,
    groups UInt32,
    dropped UInt64,
    left_out UInt32
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_incoming_from_logs TO fleet_incoming AS
SELECT
    replaceRegexpOne(EventName, '^sowatch\\.(library|fleet)\\.', '') AS event,
    toUInt64(toUnixTimestamp64Nano(Timestamp)) AS version,
    ResourceAttributes['host.id'] AS host_id,
    ResourceAttributes['host.name'] AS host_name,
    ResourceAttributes['sowatch.boot.id'] AS boot_id,
    ResourceAttributes['service.version'] AS agent_version,
    toUInt64OrZero(ResourceAttributes['sowatch.fleet.epoch']) AS epoch,
    toUInt32OrZero(LogAttributes['sowatch.fleet.snapshot']) AS snapshot,
    toUInt32OrZero(LogAttributes['sowatch.fleet.seq']) AS seq,
    reinterpretAsUInt64(reverse(unhex(LogAttributes['sowatch.library.key']))) AS key,
    LogAttributes['sowatch.library.build_id'] AS build_id,
    LogAttributes['sowatch.library.soname'] AS soname,
    LogAttributes['sowatch.library.path'] AS path,
    LogAttributes['sowatch.library.kind'] AS kind,
    LogAttributes['process.executable.path'] AS exe,
    LogAttributes['process.executable.build_id.gnu'] AS exe_build_id,
    LogAttributes['container.id'] AS container,
    LogAttributes['k8s.pod.uid'] AS pod_uid,
    LogAttributes['k8s.pod.name'] AS pod,
    LogAttributes['k8s.namespace.name'] AS namespace,
    LogAttributes['sowatch.unit'] AS unit,
    LogAttributes['sowatch.package.name'] AS package,
    LogAttributes['sowatch.package.version'] AS package_version,
    LogAttributes['sowatch.package.source'] AS source_package,
    LogAttributes['sowatch.package.purl'] AS purl,
    LogAttributes['sowatch.package.identified_by'] AS identified_by,
    toUInt32OrZero(LogAttributes['sowatch.library.processes']) AS processes,
    toUInt64OrZero(LogAttributes['sowatch.library.short_lived']) AS short_lived,
    arrayMap(one -> toUInt32OrZero(one), splitByChar(',', LogAttributes['sowatch.library.pids'])) AS pids,
    LogAttributes['sowatch.process.listen'] AS listen,
    LogAttributes['sowatch.library.stale'] AS stale,
    toUInt64OrZero(LogAttributes['sowatch.library.stale_since']) AS stale_since,
    toUInt64OrZero(LogAttributes['sowatch.library.since']) AS since,
    toUInt32OrZero(LogAttributes['sowatch.fleet.records']) AS records,
    toUInt32OrZero(LogAttributes['sowatch.fleet.interval_s']) AS interval_s,
    LogAttributes['sowatch.watch.strategy'] AS strategy,
    LogAttributes['sowatch.watch.guarantee'] AS guarantee,
    LogAttributes['sowatch.watch.limits'] AS limits,
    toUInt64OrZero(LogAttributes['sowatch.watch.lost']) AS lost,
    toUInt64OrZero(LogAttributes['sowatch.watch.repaired']) AS repaired,
    LogAttributes['sowatch.watch.is_repaired'] = 'true' AS is_repaired,
    toUInt32OrZero(LogAttributes['sowatch.watch.unreadable']) AS unreadable,
    toUInt32OrZero(LogAttributes['sowatch.fleet.groups']) AS groups,
    toUInt64OrZero(LogAttributes['sowatch.fleet.dropped']) AS dropped,
    toUInt32OrZero(LogAttributes['sowatch.fleet.left_out']) AS left_out
FROM otel_logs
WHERE ScopeName = 'sowatch.fleet' AND ResourceAttributes['host.id'] != ''
    AND Timestamp > now64(9) - INTERVAL 29 DAY AND Timestamp < now64(9) + INTERVAL 5 MINUTE;

-- Hosts whose clock is wrong by far. Their records would expire before they are asked for, or replace those to come; so none
-- is taken, and what is missing of a snapshot shows.
CREATE TABLE IF NOT EXISTS fleet_refused
(
    host_id String,
    host_name SimpleAggregateFunction(anyLast, String),
    version SimpleAggregateFunction(max, UInt64),
    arrived SimpleAggregateFunction(max, DateTime64(3)),
    records SimpleAggregateFunction(sum, UInt64)
)
ENGINE = AggregatingMergeTree
ORDER BY host_id
TTL toDateTime(arrived) + INTERVAL 30 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_refused_from_logs TO fleet_refused AS
SELECT
    ResourceAttributes['host.id'] AS host_id,
    anyLast(ResourceAttributes['host.name']) AS host_name,
    max(toUInt64(toUnixTimestamp64Nano(Timestamp))) AS version,
    now64(3) AS arrived,
    count() AS records
FROM otel_logs
WHERE (Timestamp <= now64(9) - INTERVAL 29 DAY OR Timestamp >= now64(9) + INTERVAL 5 MINUTE)
    AND ScopeName = 'sowatch.fleet' AND ResourceAttributes['host.id'] != ''
GROUP BY host_id;

-- What is mapped by whom on each host, last reported. A row with no processes is kept until its TTL: a late older one must
-- not come back. An agent sends everything anew some times a day, so a row that is in force is never as old as that.
CREATE TABLE IF NOT EXISTS fleet_state
(
    build_id String,
    host_id String,
    key UInt64,
    version UInt64 CODEC(Delta(8), ZSTD(1)),
    epoch UInt64 CODEC(Delta(8), ZSTD(1)),
    snapshot UInt32,
    soname LowCardinality(String),
    path String,
    kind LowCardinality(String),
    exe String,
    exe_build_id String,
    container String,
    pod_uid String,
    pod String,
    namespace LowCardinality(String),
    unit LowCardinality(String),
    purl String,
    processes UInt32,
    short_lived UInt64,
    pids Array(UInt32),
    listen String,
    stale LowCardinality(String),
    stale_since UInt64,
    since UInt64 CODEC(Delta(8), ZSTD(1))
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (build_id, host_id, key)
TTL toDateTime(intDiv(version, 1000000000)) + INTERVAL 30 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_state_from_incoming TO fleet_state AS
SELECT build_id, host_id, key, version, epoch, snapshot, soname, path, kind, exe, exe_build_id, container, pod_uid, pod,
    namespace, unit, purl, processes, short_lived, pids, listen, stale, stale_since, since
FROM fleet_incoming
WHERE event IN ('state', 'mapped', 'unmapped');

-- Which builds there are, under which names and of which package: small, and what a name is looked up in. A file that was
-- replaced before its package was read has that of another host with the same build id.
CREATE TABLE IF NOT EXISTS fleet_builds
(
    build_id String,
    soname String,
    path String,
    purl String,
    package LowCardinality(String),
    package_version String,
    source_package LowCardinality(String),
    identified_by LowCardinality(String),
    version UInt64
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (build_id, purl, soname, path)
TTL toDateTime(intDiv(version, 1000000000)) + INTERVAL 90 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_builds_from_incoming TO fleet_builds AS
SELECT build_id, soname, path, purl, any(package) AS package, any(package_version) AS package_version,
    any(source_package) AS source_package, any(identified_by) AS identified_by, max(incoming.version) AS version
FROM fleet_incoming AS incoming
WHERE event IN ('state', 'mapped', 'unmapped')
GROUP BY build_id, soname, path, purl;

-- From when to when each group had processes: a row for as long as it has some, however often it is sent. One that no
-- unmapped record ended ends with the first complete snapshot that begins after its last record.
CREATE TABLE IF NOT EXISTS fleet_history
(
    build_id String,
    host_id String,
    key UInt64,
    since UInt64 CODEC(Delta(8), ZSTD(1)),
    first_version SimpleAggregateFunction(min, UInt64) CODEC(Delta(8), ZSTD(1)),
    last_version SimpleAggregateFunction(max, UInt64) CODEC(Delta(8), ZSTD(1)),   -- of its last record
    gone_version SimpleAggregateFunction(max, UInt64),                            -- of the one without processes, else 0
    stale_since SimpleAggregateFunction(min, Nullable(UInt64))                    -- since when it first was; null: it was not
)
ENGINE = AggregatingMergeTree
ORDER BY (build_id, host_id, key, since)
TTL toDateTime(intDiv(last_version, 1000000000)) + INTERVAL 90 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_history_from_incoming TO fleet_history AS
SELECT build_id, host_id, key, if(since = 0, epoch, since) AS since, version AS first_version, version AS last_version,
    if(processes = 0, version, 0) AS gone_version, nullIf(incoming.stale_since, 0) AS stale_since
FROM fleet_incoming AS incoming
WHERE event IN ('state', 'mapped', 'unmapped');

-- What was received of each snapshot: a gap in its numbers is a loss that nobody reported.
CREATE TABLE IF NOT EXISTS fleet_streams
(
    host_id String,
    epoch UInt64,
    snapshot UInt32,
    seqs AggregateFunction(groupBitmap, UInt32),
    last_seq SimpleAggregateFunction(max, UInt32),
    previous_records SimpleAggregateFunction(max, UInt32),   -- that were made of the snapshot before, as its begin has it
    end_version SimpleAggregateFunction(max, UInt64),        -- when its end was sent; 0 until that arrived
    first_version SimpleAggregateFunction(min, UInt64),
    last_version SimpleAggregateFunction(max, UInt64)
)
ENGINE = AggregatingMergeTree
ORDER BY (host_id, epoch, snapshot)
TTL toDateTime(intDiv(last_version, 1000000000)) + INTERVAL 90 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_streams_from_incoming TO fleet_streams AS
SELECT
    host_id,
    epoch,
    snapshot,
    groupBitmapState(seq) AS seqs,
    max(seq) AS last_seq,
    maxIf(records, event = 'snapshot_begin') AS previous_records,
    maxIf(version, event = 'snapshot_end') AS end_version,
    min(version) AS first_version,
    max(version) AS last_version
FROM fleet_incoming
GROUP BY host_id, epoch, snapshot;

-- The last heartbeat of each host.
CREATE TABLE IF NOT EXISTS fleet_hosts
(
    host_id String,
    version UInt64,
    host_name String,
    boot_id String,
    agent_version LowCardinality(String),
    epoch UInt64,
    snapshot UInt32,
    interval_s UInt32,
    strategy LowCardinality(String),
    guarantee LowCardinality(String),
    limits String,
    lost UInt64,
    repaired UInt64,
    is_repaired UInt8,
    unreadable UInt32,
    groups UInt32,
    dropped UInt64,
    left_out UInt32,
    arrived DateTime64(3) DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree(version)
ORDER BY host_id
TTL toDateTime(intDiv(version, 1000000000)) + INTERVAL 90 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS fleet_hosts_from_incoming TO fleet_hosts AS
SELECT host_id, version, host_name, boot_id, agent_version, epoch, snapshot, interval_s, strategy, guarantee, limits, lost,
    repaired, is_repaired, unreadable, groups, dropped, left_out
FROM fleet_incoming
WHERE event = 'heartbeat';
