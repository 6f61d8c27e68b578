"""Who maps what in a fleet, by the rules of docs/decisions/0069-fleet-records.md, asked of the real engine."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from sowatch.fleet.questions import Fleet
from sowatch.fleet.targets import Target, target_of
from sowatch.model.encoding import dumps
from sowatch.model.escape import visible
from support.fleet_records import SECOND, Group, HostRecords, debian

HOUR = 3600 * SECOND
DAY = 24 * HOUR
OLD = "aa" * 20
NEW = "bb" * 20
SSL = Group("/usr/lib/libssl.so.3", OLD, "libssl.so.3", debian("libssl3", "3.0.11-1", "openssl"), listen="tcp:443")
SSL_NEW = replace(SSL, build_id=NEW, package=debian("libssl3", "3.0.13-1", "openssl"))
LIBC = Group("/usr/lib/libc.so.6", "cc" * 20, "libc.so.6", debian("libc6", "2.36-9", "glibc"))


@pytest.fixture
def now() -> int:
    return time.time_ns()


def agent(name: str, epoch_ns: int) -> HostRecords:
    return HostRecords(host_id=f"id-{name}", name=name, epoch_ns=epoch_ns)


def beat(host: HostRecords, at_ns: int):
    host.now_ns = at_ns
    return host.heartbeat()


def who(fleet: Fleet, text: str):
    answer = fleet.who(target_of(text))
    lines = list(answer.lines)
    for line in (answer.head, *lines):
        dumps(line)
    return answer.head, lines


def states(fleet: Fleet) -> dict[str, tuple[str, str]]:
    return {one.host_name: (one.state, one.reason) for one in fleet.hosts}


# ---- answers -------------------------------------------------------------------------------------


def test_no_host_is_no_answer(store, now: int) -> None:
    head, lines = who(store.at(now), OLD)
    assert (head.answer, head.builds, lines) == ("not observed", [], [])


def test_a_mapping_is_answered_with_its_host_and_all_that_was_reported(store, now: int) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([SSL, LIBC]), beat(web, now))
    head, (line,) = who(store.at(now), OLD)
    assert (head.answer, head.mapped_host_count, head.hosts.answered) == ("mapped", 1, 1)
    assert head.targets[0].kind == "build_id"
    assert (line.host_name, line.answer, line.state) == ("web", "mapped", "answered")
    assert (line.build_id, line.soname, line.path, line.listen) == (OLD, "libssl.so.3", SSL.path, ["tcp:443"])
    assert (line.unit, line.exe, line.process_count, line.pids) == ("nginx.service", "/usr/sbin/nginx", 1, [4711])
    assert line.purl.startswith("pkg:deb/debian/libssl3@3.0.11-1")


def test_what_was_unmapped_is_not_mapped_and_a_late_older_row_does_not_bring_it_back(store, now: int) -> None:
    web = agent("web", now - HOUR)
    snapshot = web.snapshot_of([SSL])
    gone = web.unmapped(SSL)
    store.take(gone, beat(web, now))
    store.take(snapshot)
    store.take(snapshot)
    head, lines = who(store.at(now), OLD)
    assert (head.answer, head.not_mapped_host_count, lines) == ("not mapped", 1, [])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (OLD, "build_id"),
        (OLD[:8].upper(), "build_id"),
        ("libssl.so.3", "soname"),
        ("libssl", "soname"),
        ("/usr/lib/libssl.so.3", "path"),
        ("pkg:deb/debian/libssl3@3.0.11-1", "purl"),
        ("pkg:deb/debian/libssl3@3.0.11-1?distro=debian-12&arch=amd64", "purl"),
        ("pkg:deb/debian/libssl3", "purl"),
    ],
)
def test_a_library_is_found_by_each_of_its_names(store, now: int, text: str, kind: str) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([SSL, LIBC]), beat(web, now))
    head, lines = who(store.at(now), text)
    assert head.targets[0].kind == kind
    assert [line.build_id for line in lines] == [OLD]


@pytest.mark.parametrize(
    "text", ["libss", "ssl.so.3", "pkg:deb/debian/libssl3@3.0.13-1", "pkg:deb/debian/libssl", "/lib", "dd" * 20]
)
def test_other_names_find_nothing(store, now: int, text: str) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([SSL, LIBC]), beat(web, now))
    head, lines = who(store.at(now), text)
    assert (head.answer, lines) == ("not mapped", [])


def test_a_file_whose_package_was_not_read_has_that_of_another_host(store, now: int) -> None:
    web, database = agent("web", now - HOUR), agent("database", now - HOUR)
    store.take(web.snapshot_of([SSL]), database.snapshot_of([replace(SSL, package=None)]))
    store.take(beat(web, now), beat(database, now))
    head, lines = who(store.at(now), "pkg:deb/debian/libssl3")
    assert head.mapped_host_count == 2
    assert {line.host_name for line in lines} == {"web", "database"}


@pytest.mark.parametrize("text", [OLD, "pkg:deb/debian/libssl3"])
def test_a_file_without_a_build_id_leaves_open_whether_it_is_that_build(store, now: int, text: str) -> None:
    web, database, other = (agent(name, now - HOUR) for name in ("web", "database", "other"))
    unnamed = replace(SSL, build_id="", package=None)
    store.take(web.snapshot_of([SSL]), database.snapshot_of([unnamed]), other.snapshot_of([replace(LIBC, build_id="")]))
    store.take(beat(web, now), beat(database, now), beat(other, now))
    head, lines = who(store.at(now), text)
    assert (head.mapped_host_count, head.not_mapped_host_count, head.not_observed_host_count) == (1, 1, 1)
    assert [line.host_name for line in lines if line.answer == "not observed"] == ["database"]


def remediated(fleet: Fleet, text: str) -> tuple[str, list[str], list[str]]:
    """The answer, the builds of which it is not known, and the hosts with rows of them."""
    head, lines = fleet.remediated([target_of(text)])
    found = [line.host_name for line in lines if line.answer == "not observed"]
    return head.answer, [one.build_id for one in head.unknown_builds], found


@pytest.mark.parametrize("text", ["pkg:deb/debian/libssl3@3.0.11-1", "pkg:deb/debian/openssl@3.0.11-1"])
def test_a_build_whose_package_nobody_knows_leaves_open_whether_it_is_of_that_one(store, now: int, text: str) -> None:
    web, lab = agent("web", now - HOUR), agent("lab", now - HOUR)
    # The agent of lab was installed after the upgrade: the old file is deleted, and has no package any more.
    store.take(web.snapshot_of([SSL_NEW, LIBC]), lab.snapshot_of([replace(SSL, package=None), LIBC]))
    store.take(beat(web, now), beat(lab, now))
    assert remediated(store.at(now), text) == ("not observed", [OLD], ["lab"])
    head, lines = who(store.at(now), text)
    assert (head.answer, head.not_mapped_host_count, [one.build_id for one in head.unknown_builds]) == (
        *("not observed", 1),
        [OLD],
    )
    assert [line.host_name for line in lines] == ["lab"]


@pytest.mark.parametrize(
    ("file", "soname"),
    [("/opt/libssl.so.3.0.7", ""), ("/opt/x", "libssl.so.3"), ("/old/libssl.so.1.1", "libssl.so.1.1")],
)
def test_a_build_of_no_package_counts_where_its_name_was_reported_of_the_package(
    store, now: int, file: str, soname: str
) -> None:
    web, lab = agent("web", now - HOUR), agent("lab", now - HOUR)
    store.take(web.snapshot_of([SSL_NEW]), lab.snapshot_of([Group(file, OLD, soname)]))
    store.take(beat(web, now), beat(lab, now))
    assert remediated(store.at(now), "pkg:deb/debian/libssl3@3.0.11-1") == ("not observed", [OLD], ["lab"])


def test_a_build_of_no_package_and_of_another_name_does_not_count(store, now: int) -> None:
    web, lab = agent("web", now - HOUR), agent("lab", now - HOUR)
    own = Group("/opt/libown.so", "dd" * 20, "libown.so")
    store.take(web.snapshot_of([SSL_NEW]), lab.snapshot_of([own, replace(own, build_id="", path="/opt/libother.so")]))
    store.take(beat(web, now), beat(lab, now))
    assert remediated(store.at(now), "pkg:deb/debian/libssl3@3.0.11-1") == ("not mapped", [], [])


def test_a_build_whose_package_another_host_knows_is_of_that_one(store, now: int) -> None:
    web, lab = agent("web", now - HOUR), agent("lab", now - HOUR)
    store.take(web.snapshot_of([SSL_NEW]), lab.snapshot_of([replace(SSL_NEW, package=None)]))
    store.take(beat(web, now), beat(lab, now))
    assert remediated(store.at(now), "pkg:deb/debian/libssl3@3.0.11-1") == ("not mapped", [], [])


def test_a_build_of_no_package_that_is_mapped_nowhere_any_more_leaves_nothing_open(store, now: int) -> None:
    lab = agent("lab", now - HOUR)
    store.take(lab.snapshot_of([replace(SSL, package=None)]), lab.unmapped(replace(SSL, package=None)), beat(lab, now))
    assert remediated(store.at(now), "pkg:deb/debian/libssl3@3.0.11-1") == ("not mapped", [OLD], [])


@pytest.mark.parametrize("text", ["pkg:deb/debian/libssl3@3.0.11-1", "pkg:deb/debian/openssl@3.0.11-1"])
def test_a_file_without_build_id_and_package_leaves_open_whether_it_is_of_that_one(store, now: int, text: str) -> None:
    web, lab, other = (agent(name, now - HOUR) for name in ("web", "lab", "other"))
    # Of the file that other maps the package is known, which is another one.
    store.take(web.snapshot_of([SSL_NEW]), lab.snapshot_of([replace(SSL, build_id="", package=None)]))
    store.take(other.snapshot_of([replace(LIBC, build_id="")]), beat(web, now), beat(lab, now), beat(other, now))
    assert remediated(store.at(now), text) == ("not observed", [""], ["lab"])


def test_a_build_of_which_no_host_has_reported_anything_may_be_any_file_without_a_build_id(store, now: int) -> None:
    web, database = agent("web", now - HOUR), agent("database", now - HOUR)
    store.take(web.snapshot_of([LIBC]), database.snapshot_of([replace(SSL, build_id="")]), beat(web, now))
    store.take(beat(database, now))
    head, _ = who(store.at(now), "ee" * 20)
    assert (head.answer, head.not_mapped_host_count, head.not_observed_host_count) == ("not observed", 1, 1)


def test_a_build_that_two_packages_have_is_of_the_one_that_its_host_reported(store, now: int) -> None:
    web, database = agent("web", now - HOUR), agent("database", now - HOUR)
    store.take(web.snapshot_of([SSL]), database.snapshot_of([replace(SSL, package=debian("libssl3", "3.0.11-1+b1"))]))
    store.take(beat(web, now), beat(database, now))
    _, lines = who(store.at(now), "pkg:deb/debian/libssl3@3.0.11-1")
    assert [line.host_name for line in lines] == ["web"]


@pytest.mark.parametrize("name", ["'; DROP TABLE fleet_state; --", "a\\", "{now:UInt64}", "x\ty\nz", "ü", "it's"])
def test_names_are_no_sql(store, now: int, name: str) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([replace(SSL, soname=name, path=f"/lib/{name}"), LIBC]), beat(web, now))
    for target in (Target("soname", name), Target("path", f"/lib/{name}")):
        lines = list(store.at(now).who(target).lines)
        assert [(line.soname, line.path) for line in lines] == [(name, f"/lib/{name}")]


@pytest.mark.parametrize("name", ["a\\b.so", "x\ty.so", "\udcff.so", "\u202e.so", "a\\x2db.so", "ü.so"])
def test_a_name_is_asked_for_as_it_is_and_as_answers_show_it(store, now: int, name: str) -> None:
    web, shown = agent("web", now - HOUR), visible(name)  # as agents send it
    store.take(web.snapshot_of([replace(SSL, soname=shown, path=f"/opt/{shown}"), LIBC]), beat(web, now))
    for text in (name, shown):
        for target in (Target("soname", text), Target("path", f"/opt/{text}"), Target("soname", text[:-3])):
            head = store.at(now).remediated([target]).head
            assert (head.answer, head.targets[0].text) == ("mapped", target.text)


def test_a_host_that_does_not_answer_is_shown_with_what_it_reported_last(store, now: int) -> None:
    web, database = agent("web", now - 2 * HOUR), agent("database", now - 2 * HOUR)
    store.take(web.snapshot_of([SSL]), database.snapshot_of([LIBC]))
    store.take(beat(web, now - HOUR), beat(database, now))
    head, (mapping, host) = who(store.at(now), OLD)
    assert (head.answer, head.not_observed_host_count, head.hosts.silent) == ("not observed", 1, 1)
    assert (mapping.answer, mapping.host_name, mapping.state) == ("not observed", "web", "silent")
    assert (host.host_name, host.answer, host.reason) == ("web", "not observed", "no heartbeat for three intervals")


# ---- states of hosts -----------------------------------------------------------------------------


def test_a_host_that_sent_nothing_but_a_snapshot_is_silent(store, now: int) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([SSL]))
    assert list(states(store.at(now)).values()) == [("silent", "no heartbeat ever")]


def test_an_expected_host_of_which_nothing_came_is_silent(store, now: int) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([LIBC]), beat(web, now))
    fleet = store.at(now, expected=["web", "id-web", "mail"])
    assert states(fleet)["mail"][0] == "silent"
    assert len(fleet.hosts) == 2
    assert who(fleet, OLD)[0].answer == "not observed"


def test_an_agent_that_dies_within_its_first_snapshot_leaves_its_host_unknown(store, now: int) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([LIBC, SSL])[:2], beat(web, now))
    fleet = store.at(now)
    assert states(fleet) == {"web": ("lossy", "its first snapshot is not complete")}
    assert who(fleet, OLD)[0].answer == "not observed"


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_record_of_a_snapshot_that_is_missing_makes_its_host_lossy(store, now: int, missing: int) -> None:
    web = agent("web", now - HOUR)
    snapshot = web.snapshot_of([SSL, LIBC])
    late = snapshot.pop(missing)
    store.take(snapshot, beat(web, now))
    assert states(store.at(now))["web"] == ("lossy", "records are missing")
    store.take(late)
    assert states(store.at(now))["web"] == ("answered", "")


def test_a_snapshot_that_is_begun_anew_ends_a_loss_when_it_is_complete(store, now: int) -> None:
    web = agent("web", now - 3 * HOUR)
    store.take(web.snapshot_of([LIBC]))
    web.mapped(SSL)  # lost
    store.take(beat(web, now - HOUR))
    anew = web.snapshot_of([LIBC, SSL])
    store.take(anew[:-1], beat(web, now))
    assert states(store.at(now))["web"][0] == "lossy"
    store.take(anew[-1:])
    assert states(store.at(now))["web"] == ("answered", "")
    assert who(store.at(now), OLD)[0].answer == "mapped"


def test_a_heartbeat_shows_that_the_end_of_a_snapshot_before_it_was_lost(store, now: int) -> None:
    web = agent("web", now - 3 * HOUR)
    store.take(web.snapshot_of([LIBC, SSL]), beat(web, now - HOUR))
    store.take(web.snapshot_of([LIBC, SSL])[:2], beat(web, now))
    fleet = store.at(now)
    assert states(fleet)["web"][0] == "lossy"


def test_until_the_next_snapshot_is_complete_the_one_before_holds(store, now: int) -> None:
    web = agent("web", now - 3 * HOUR)
    store.take(web.snapshot_of([LIBC, SSL]), beat(web, now))
    store.take(web.snapshot_of([LIBC, SSL])[:2])
    fleet = store.at(now)
    assert states(fleet)["web"] == ("answered", "")
    assert who(fleet, OLD)[0].answer == "mapped"


def test_what_is_missing_at_the_end_of_a_snapshot_shows_in_the_next_one(store, now: int) -> None:
    web = agent("web", now - 3 * HOUR)
    store.take(web.snapshot_of([LIBC]), beat(web, now - SECOND))
    web.now_ns = now
    web.mapped(SSL)  # lost, and nothing comes after it in this snapshot
    assert states(store.at(now))["web"] == ("answered", "")
    store.take(web.snapshot_of([LIBC, SSL])[:1])
    assert states(store.at(now))["web"] == ("lossy", "records are missing")


def test_what_a_killed_agent_never_ended_goes_with_the_first_snapshot_of_the_next_one(store, now: int) -> None:
    web = agent("web", now - 3 * HOUR)
    store.take(web.snapshot_of([SSL, LIBC]), beat(web, now - HOUR))
    web.restart(now - HOUR + 60 * SECOND)
    begin, *rest = web.snapshot_of([LIBC])
    store.take(begin, rest[0])
    store.take(beat(replace(web), now))
    fleet = store.at(now)
    assert states(fleet)["web"] == ("lossy", "the snapshot of its new agent is not complete")
    assert who(fleet, OLD)[0].answer == "not observed"
    store.take(rest, beat(web, now))
    assert states(store.at(now))["web"] == ("answered", "")
    assert who(store.at(now), OLD)[0].answer == "not mapped"


def test_late_records_of_an_old_epoch_change_nothing(store, now: int) -> None:
    web = agent("web", now - 3 * HOUR)
    old = [*web.snapshot_of([LIBC]), web.mapped(SSL), beat(web, now - 2 * HOUR)]
    web.restart(now - HOUR)
    store.take(web.snapshot_of([LIBC]), beat(web, now))
    store.take(old)
    assert states(store.at(now))["web"] == ("answered", "")
    assert who(store.at(now), OLD)[0].answer == "not mapped"


def test_two_hosts_with_one_machine_id_are_lossy(store, now: int) -> None:
    first, second = agent("web", now - 3 * HOUR), agent("web", now - 2 * HOUR)
    store.take(first.snapshot_of([SSL]), second.snapshot_of([LIBC]))
    store.take(beat(first, now - SECOND), beat(second, now))
    fleet = store.at(now)
    assert states(fleet)["web"] == ("lossy", "two agents send as this host, or its clock went back")
    assert who(fleet, OLD)[0].answer == "not observed"


def test_once_the_other_host_is_gone_a_snapshot_ends_that(store, now: int) -> None:
    first, second = agent("web", now - 3 * HOUR), agent("web", now - 2 * HOUR)
    store.take(first.snapshot_of([SSL]), second.snapshot_of([LIBC]), beat(first, now - HOUR))
    second.now_ns = now - 1000
    store.take(second.snapshot_of([LIBC]), beat(second, now))
    assert states(store.at(now))["web"] == ("answered", "")
    assert who(store.at(now), OLD)[0].answer == "not mapped"


def test_a_host_whose_clock_went_back_answers_again_after_a_snapshot(store, now: int) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of([SSL]), beat(web, now - 60 * SECOND))
    web.restart(now - 2 * HOUR)  # its clock was ahead by more than an hour
    store.take(web.snapshot_of([LIBC]))
    store.take(beat(web, now - SECOND))
    assert states(store.at(now))["web"][0] == "lossy"
    store.take(web.snapshot_of([LIBC]), beat(web, now))
    assert states(store.at(now))["web"] == ("answered", "")
    assert who(store.at(now), OLD)[0].answer == "not mapped"


def test_heartbeats_of_a_run_before_whose_clock_went_back_answer_for_no_other_run(store, now: int) -> None:
    web = agent("web", now + 100 * SECOND)  # ahead by less than the store refuses
    store.take(web.snapshot_of([SSL]))  # its heartbeat was lost
    web.restart(now - 200 * SECOND)
    store.take(web.snapshot_of([LIBC]), beat(web, now))
    fleet = store.at(now)
    assert states(fleet)["web"] == ("lossy", "two agents send as this host, or its clock went back")
    assert who(fleet, OLD)[0].answer == "not observed"


def test_a_clock_that_is_far_ahead_is_not_believed(store, now: int) -> None:
    web = agent("web", now + 300 * DAY)
    store.take(web.snapshot_of([SSL]), web.heartbeat())
    reason = "its clock is more than five minutes ahead: its records are not taken"
    assert states(store.at(now)) == {"web": ("silent", reason)}
    web.restart(now - SECOND)
    store.take(web.snapshot_of([LIBC]), beat(web, now))
    later = store.at(now + 300 * SECOND)
    assert states(later)["web"] == ("silent", "no heartbeat for three intervals")
    store.take(beat(web, now + 200 * SECOND))
    assert states(store.at(now + 210 * SECOND))["web"][0] == "silent"  # its heartbeat is no later than its arrival


def test_records_that_would_expire_are_not_counted_as_received(store, now: int) -> None:
    web = agent("web", 1_000_000_000 * SECOND)  # no clock yet
    store.take(web.snapshot_of([SSL]))
    store.take(beat(web, now))
    fleet = store.at(now)
    assert states(fleet)["web"][0] != "answered"
    assert who(fleet, OLD)[0].answer == "not observed"


def test_a_host_that_was_away_for_31_days_is_not_counted_until_it_comes_back(store, now: int) -> None:
    web = agent("web", now - 25 * DAY)
    store.take(web.snapshot_of([SSL]), beat(web, now - 25 * DAY + HOUR))
    assert states(store.at(now))["web"][0] == "silent"
    assert store.at(now + 6 * DAY).hosts == []
    # The same run goes on, as after a suspend: its rows are as old as that, and expire.
    store.take(beat(web, now))
    assert states(store.at(now))["web"] == ("lossy", "its last complete snapshot is more than a week old")
    store.take(web.snapshot_of([LIBC]), beat(web, now + 1000))
    assert states(store.at(now + 1000))["web"] == ("answered", "")


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"lost": 5, "is_repaired": True}, "answered"),
        ({"lost": 5, "is_repaired": False}, "lossy"),
        ({"unreadable": 2}, "lossy"),
        ({"guarantee": "sampled", "strategy": "procfs"}, "unsupported"),
        ({"interval_s": 3600}, "answered"),
    ],
)
def test_what_the_agent_says_of_itself_decides(store, now: int, facts, state: str) -> None:
    web = replace(agent("web", now - HOUR), **facts)
    store.take(web.snapshot_of([SSL]), beat(web, now - 10 * 60 * SECOND if "interval_s" in facts else now))
    assert states(store.at(now))["web"][0] == state


def test_an_unsupported_host_maps_what_it_reports_and_nothing_else_is_known(store, now: int) -> None:
    web = replace(agent("web", now - HOUR), guarantee="sampled")
    store.take(web.snapshot_of([SSL]), beat(web, now))
    assert who(store.at(now), OLD)[0].answer == "mapped"
    assert who(store.at(now), NEW)[0].answer == "not observed"


# ---- the other questions -------------------------------------------------------------------------


def test_stale_has_only_what_is_stale_now(store, now: int) -> None:
    web, database = agent("web", now - HOUR), agent("database", now - HOUR)
    stale = replace(SSL, stale="replaced", stale_since_ns=now - 60 * SECOND)
    store.take(web.snapshot_of([SSL, LIBC]), database.snapshot_of([SSL]))
    web.now_ns = database.now_ns = now - 50 * SECOND
    store.take(web.changed(stale), database.changed(stale), database.unmapped(stale), database.mapped(SSL_NEW))
    store.take(beat(web, now), beat(database, now))
    (line,) = store.at(now).stale().lines
    assert (line.host_name, line.stale, line.path) == ("web", "replaced", SSL.path)
    assert line.stale_since is not None


def test_versions_counts_hosts_by_build(store, now: int) -> None:
    for name, groups in (("a", [SSL]), ("b", [SSL_NEW]), ("c", [SSL_NEW, LIBC])):
        host = agent(name, now - HOUR)
        store.take(host.snapshot_of(groups), beat(host, now))
    gone = agent("d", now - HOUR)
    store.take(gone.snapshot_of([SSL]))
    lines = list(store.at(now).versions(target_of("libssl")).lines)
    assert [(one.build_id, one.mapped_host_count, one.not_observed_host_count) for one in lines] == [
        (NEW, 2, 0),
        (OLD, 1, 1),
    ]
    assert "3.0.13-1" in lines[0].purls[0]


def test_history_measures_the_time_to_remediation(store, now: int) -> None:
    begin = now - 2 * HOUR
    hosts = [agent(name, begin) for name in "abc"]
    replaced = begin + HOUR
    for number, host in enumerate(hosts):
        stale = replace(SSL, stale="replaced", stale_since_ns=replaced, since_ns=begin)
        store.take(host.snapshot_of([replace(SSL, since_ns=begin), LIBC]))
        host.now_ns = replaced + SECOND
        store.take(host.changed(stale))
        if number < 2:
            host.now_ns = replaced + (number + 1) * 600 * SECOND
            store.take(host.unmapped(stale), host.mapped(replace(SSL_NEW, since_ns=host.now_ns)))
        store.take(beat(host, now))
    answer = store.at(now).history(target_of(OLD))
    *lines, total = answer.lines
    assert answer.head.answer == "mapped"
    assert [round(one.remediated_s or -1) for one in lines] == [600, 1200, -1]
    assert [one.answer for one in lines] == ["not mapped", "not mapped", "mapped"]
    assert (total.remediated_host_count, total.open_host_count) == (2, 1)
    assert [round(one or 0) for one in (total.median_s, total.p95_s)] == [600, 1200]
    assert [one.host_count for one in total.hosts_over_time] == [3, 2, 1]


def test_history_measures_from_the_first_time_that_a_group_was_stale(store, now: int) -> None:
    begin = now - 2 * HOUR
    host, since = agent("a", begin), begin + HOUR
    first = replace(SSL, stale="replaced", stale_since_ns=since, since_ns=begin)
    store.take(host.snapshot_of([replace(SSL, since_ns=begin)]))
    host.now_ns = since + SECOND
    store.take(host.changed(first))
    host.now_ns = since + 300 * SECOND
    # Its agent has forgotten since when, and finds it so again.
    store.take(host.changed(replace(first, stale_since_ns=host.now_ns)))
    host.now_ns = since + 600 * SECOND
    store.take(host.unmapped(replace(SSL, since_ns=begin)), beat(host, now))
    line, _ = store.at(now).history(target_of(OLD)).lines
    assert round(line.remediated_s or -1) == 600


def test_history_of_an_agent_that_was_killed_has_no_gap_and_an_end(store, now: int) -> None:
    begin = now - 5 * HOUR
    web = agent("web", begin)
    store.take(web.snapshot_of([SSL, LIBC]))
    store.take(beat(web, begin + HOUR))
    web.restart(begin + 2 * HOUR)
    store.take(web.snapshot_of([SSL]), beat(web, begin + 3 * HOUR))
    (line, total) = store.at(now).history(target_of(OLD)).lines
    assert line.last_gone is None
    assert [one.host_count for one in total.hosts_over_time] == [1]
    (line, total) = store.at(now).history(target_of("libc.so.6")).lines
    assert line.last_gone is not None
    assert [one.host_count for one in total.hosts_over_time] == [1, 0]


@pytest.mark.parametrize(
    ("groups", "beats", "answer"),
    [([SSL], True, "mapped"), ([LIBC], True, "not mapped"), ([LIBC], False, "not observed")],
)
def test_remediated_is_answered_for_all_hosts(store, now: int, groups, beats: bool, answer: str) -> None:
    web = agent("web", now - HOUR)
    store.take(web.snapshot_of(groups), beat(web, now if beats else now - HOUR // 2))
    found = store.at(now).remediated([target_of(OLD), target_of(NEW)])
    assert found.head.answer == answer
    assert [one.host_name for one in found.lines] == ([] if answer == "not mapped" else ["web"])


def test_silent_hosts_are_left_out_only_where_that_is_asked_for(store, now: int) -> None:
    web, database = agent("web", now - HOUR), agent("database", now - HOUR)
    store.take(web.snapshot_of([LIBC]), beat(web, now), database.snapshot_of([LIBC]))
    assert store.at(now).remediated([target_of(OLD)]).head.answer == "not observed"
    found = store.at(now).remediated([target_of(OLD)], ignore_silent=True).head
    assert (found.answer, found.hosts.silent) == ("not mapped", 1)
