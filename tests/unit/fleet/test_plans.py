"""What is restarted where, what a word means, and when an answer holds: the pure parts of the questions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.fleet.answers import Edge, fleet_answer, host_answer, over_time, quantile
from sowatch.fleet.asks import parameter, rows
from sowatch.fleet.plans import plan_line, planned
from sowatch.fleet.questions import StaleGroup
from sowatch.fleet.targets import purl_matches, target_of
from sowatch.model.errors import SowatchError, UsageError

STATES = ("answered", "silent", "lossy", "unsupported")


def group(**other: object) -> StaleGroup:
    facts: dict[str, object] = dict.fromkeys(StaleGroup.__struct_fields__, "")
    facts |= dict.fromkeys(("processes", "short_lived", "stale_since", "since", "version"), 1)
    facts |= {"host_id": "id", "host_name": "web", "state": "answered", "pids": [], "path": "/lib/libssl.so.3"}
    return StaleGroup(**facts | other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"unit": "nginx.service"}, "web systemctl restart nginx.service  # 1 process; /lib/libssl.so.3"),
        (
            {"unit": "user@1000.service/syncthing.service"},
            "web systemctl --user --machine=1000@ restart syncthing.service  # 1 process; /lib/libssl.so.3",
        ),
        # As records have it: `visible` has doubled the backslash of systemd-escape.
        (
            {"unit": r"openvpn@my\\x2dvpn.service"},
            r"web systemctl restart 'openvpn@my\x2dvpn.service'  # 1 process",
        ),
        (
            {"unit": r"user@1000.service/app\\x2da.service"},
            r"web systemctl --user --machine=1000@ restart 'app\x2da.service'  # 1 process",
        ),
        ({"unit": r"a\xff.service"}, r"# web a\xff.service: its name is none that may stand in a command"),
        ({"unit": r"a\\\x2d.service"}, r"# web a\\\x2d.service: its name is none that may stand in a command"),
        ({"unit": "session"}, "# web session: log out and in, or end what runs in it (1 process; /lib/libssl.so.3)"),
        ({}, "# web (no unit): end it and start it again (1 process; /lib/libssl.so.3)"),
        ({"unit": "../evil.service"}, "# web ../evil.service: its name is none that may stand in a command"),
        ({"unit": "dbus.service"}, "# web dbus.service: `systemctl restart dbus.service` ends login sessions"),
        ({"container": "c" * 64}, f"# web {'c' * 64}: restart the container with what started it"),
        (
            {"pod": "web-7d9c5b8f6-x2x9z", "namespace": "shop", "pod_uid": "u", "container": "c"},
            "- kubectl -n shop rollout restart deployment/web  # 1 process",
        ),
        (
            {"pod": "web-0", "namespace": "shop", "pod_uid": "u"},
            "# web web-0: if a controller has made it: kubectl -n shop delete pod web-0",
        ),
        ({"pod": "$(reboot)", "namespace": "shop", "pod_uid": "u"}, "# web $(reboot): its name is none that may stand"),
        ({"pod_uid": "u"}, "# web u: its name is not known: restart the pod"),
        ({"unit": "a.service", "host_name": "-oProxyCommand=x"}, "# -oProxyCommand=x a.service: systemctl restart"),
        (
            {"unit": "a.service", "state": "silent"},
            "web systemctl restart a.service  # 1 process; /lib/libssl.so.3; the",
        ),
    ],
)
def test_a_plan_has_a_command_where_there_is_one(facts: dict[str, object], line: str) -> None:
    (one,) = planned([group(**facts)])
    assert plan_line(one).startswith(line)
    assert "\n" not in plan_line(one)


def test_what_one_unit_runs_on_several_files_is_restarted_once() -> None:
    first = group(unit="a.service", exe="/a", processes=3, listen="tcp:443,udp:53")
    second = group(unit="a.service", exe="/a", processes=3, path="/lib/libc.so.6", listen="tcp:443")
    third = group(unit="a.service", exe="/b", processes=2)
    made = list(planned([first, second, third, group(unit="b.service")]))
    assert [one.name for one in made] == ["a.service", "b.service"]
    assert (made[0].processes, made[0].listen) == (5, ["tcp:443", "udp:53"])
    assert made[0].paths == ["/lib/libc.so.6", "/lib/libssl.so.3"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("deadbeef", "build_id"),
        ("htlhash:DEADBEEF00", "build_id"),
        ("deadbee", "soname"),
        ("libc.so.6", "soname"),
        ("pkg:rpm/fedora/openssl-libs@3.2-1?arch=x86_64", "purl"),
        ("/memfd:x", "path"),
        ("cve-2024-5535", "cve"),
        ("GHSA-abcd-1234-efgh", "cve"),
        ("DSA-5764-1", "cve"),
        ("DEBIAN-CVE-2024-5535", "cve"),
    ],
)
def test_a_word_is_taken_by_its_form(text: str, kind: str) -> None:
    assert target_of(text).kind == kind


@pytest.mark.parametrize(("text", "kind"), [("", None), ("x", "build_id"), ("x", "purl"), ("x", "path"), ("x", "y")])
def test_a_word_that_is_none_of_its_kind_is_refused(text: str, kind: str | None) -> None:
    with pytest.raises(UsageError):
        target_of(text, kind)


@pytest.mark.parametrize(
    ("asked", "purl", "is_one"),
    [
        ("pkg:deb/debian/a@1%3A2-1", "pkg:deb/debian/a@1:2-1", True),
        ("pkg:deb/debian/a", "pkg:deb/debian/ab@1", False),
        ("pkg:npm/%40scope/a", "pkg:npm/@scope/a@1", True),
        ("pkg:deb/debian/a@1?distro=debian-12", "pkg:deb/debian/a@1", False),
    ],
)
def test_purls_are_compared_by_what_they_say(asked: str, purl: str, is_one: bool) -> None:
    assert purl_matches(asked, purl) is is_one


@given(st.lists(st.tuples(st.sampled_from(STATES), st.booleans())))
def test_not_mapped_is_answered_only_where_every_host_answered_and_none_has_it(hosts) -> None:
    answers = [host_answer(state, is_in_force=has_it) for state, has_it in hosts]
    found = fleet_answer(answers)
    assert (found == "not mapped") == (bool(hosts) and all(one == ("answered", False) for one in hosts))
    assert (found == "mapped") == any(has_it and state in ("answered", "unsupported") for state, has_it in hosts)


@given(st.lists(st.lists(st.integers(0, 50), unique=True, max_size=6)), st.integers(0, 50))
def test_the_number_of_hosts_over_time_is_what_their_times_say(times: list[list[int]], since: int) -> None:
    edges = [[Edge(at, place % 2 == 0) for place, at in enumerate(sorted(some))] for some in times]
    found = over_time(edges, since)
    for at in range(since, 52):
        right = sum(sum(1 if one.is_mapped else -1 for one in some if one.at_ns <= at) for some in edges)
        known = [hosts for begin, hosts in found if begin <= at]
        assert (known[-1] if known else 0) == right


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_not_exceeded_by_its_share(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(one <= found for one in values) >= share * len(values) - 1e-6


@given(st.lists(st.binary(max_size=4)))
def test_rows_are_put_together_however_they_are_cut(cuts: list[bytes]) -> None:
    text = b'{"name":"a"}\n{"name":"b"}\n'

    class Pieces:
        def ask(self, sql: str, parameters: object) -> list[bytes]:
            places = sorted({len(cut) * 7 % len(text) for cut in cuts})
            return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]

    assert list(rows(Pieces(), "", dict)) == [{"name": "a"}, {"name": "b"}]


def test_a_row_of_another_version_is_an_error_with_the_next_step() -> None:
    class Other:
        def ask(self, sql: str, parameters: object) -> list[bytes]:
            return [b"Code: 60. DB::Exception: Unknown table\n"]

    with pytest.raises(SowatchError, match="sowatch fleet schema"):
        list(rows(Other(), "", dict))


def test_parameters_are_written_as_both_engines_read_them() -> None:
    assert parameter("a\\b\tc\n") == "a\\\\b\\tc\\n"
    assert parameter(["a\\b", "it's", "tab\t"]) == "['a\\\\b','it\\'s','tab\t']"
    assert parameter("/lib/\udcff.so") == "/lib/\\\\xff.so"
