"""What an attacher says is what the kernel has: verified, repaired, tried again."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.bpf.probe_object import Link, ProbeObject, has_uprobe_multi
from sowatch.model.errors import BpfError, EnvironmentFault, SowatchError
from sowatch.uprobes import Attacher, Probe, best_effort
from sowatch.uprobes.attached import Linker
from sowatch.uprobes.self_test import SelfTest
from support.callers import Caller

Probed = Callable[..., Path]
NewCaller = Callable[..., Caller]

links = pytest.mark.parametrize("links", ["auto", "perf_event"])


def link_of(attacher: Attacher) -> Link:
    (group,) = (group for file in attacher._files.values() for group in file.groups)
    assert group.link is not None
    return group.link


@links
def test_the_kernel_says_where_a_link_is(user_object: Path, probed: Probed, active: Any, links: str) -> None:
    library = probed()
    with Attacher(user_object, {"plain": "by_section"}, links=links) as attacher:
        attacher.attach(active(library))
        (site,) = attacher.sites.values()
        place = link_of(attacher).place(1)
        if place is None:
            pytest.skip("this kernel does not say where links of uprobes are (6.6, 6.8)")
        assert (place.total, place.offsets) == (1, (site.offset,))
        is_multi = links == "auto" and has_uprobe_multi()
        assert place.path == (str(library) if is_multi else None)


@pytest.mark.parametrize(
    ("links", "fault"),
    [
        ("auto", "closed"),
        ("auto", "elsewhere"),
        ("auto", "another file"),  # of a perf event the kernel does not say which
        ("perf_event", "closed"),
        ("perf_event", "elsewhere"),
    ],
)
def test_a_link_that_is_gone_or_on_another_place_is_made_anew(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any, links: str, fault: str
) -> None:
    library = probed()
    process = caller(library)
    with Attacher(user_object, {"plain": "by_section"}, links=links, verify_s=3600.0) as attacher:
        ring = attacher.ring("events")
        attacher.attach(active(library))
        assert (attacher.verify(), attacher.stats.repaired) == (0, 0)
        if fault == "closed":
            link_of(attacher).close()
        else:
            place = link_of(attacher).place(1)
            if place is None or (fault == "another file" and place.path is None):
                pytest.skip("this kernel does not say where links of uprobes are (6.6, 6.8)")
            symbol, target = ("nested", library) if fault == "elsewhere" else ("plain", probed("libother.so"))
            with Attacher(user_object, {symbol: "by_section"}, links=links) as other:
                other.attach(active(target))
                elsewhere = link_of(other)
                mine = link_of(attacher)
                # The descriptor leads to the other link from now on, as if somebody had put it there.
                os.dup2(elsewhere.fileno(), mine.fileno())
                mine.id = elsewhere.id
        if fault == "elsewhere":
            library.rename(library.with_name("librenamed.so"))  # which is no fault
        assert attacher.verify() == 1
        process.call("plain")
        process.call("nested", -7)
        assert len(list(ring.take())) == 2  # nested calls plain, and is not probed itself
        assert (attacher.stats.repaired, attacher.stats.attached, attacher.verify()) == (1, 1, 0)


@links
def test_a_probe_of_our_own_runs_and_one_that_does_not_is_reported_and_made_anew(links: str) -> None:
    test = SelfTest(is_multi=links == "auto" and bool(has_uprobe_multi()))
    try:
        assert (test.run(), test.error) == (True, None)
        assert test.run()
        assert test._link is not None
        test._link.close()
        assert (test.run(), test.repaired) == (True, 1)
    finally:
        test.close()


def test_a_self_test_that_cannot_pass_is_in_the_gauges(user_object: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Attacher(user_object, {"plain": "by_section"}, verify_s=3600.0) as attacher:
        assert attacher.stats.self_test_error is None
        # The function is not called: as if the kernel did not run the probe.
        monkeypatch.setattr("sowatch.uprobes.self_test.run_self_test", lambda: None)
        attacher.verify()
        assert attacher.stats.self_test_error == "the kernel does not run a probe of sowatch's own"
        monkeypatch.undo()
        attacher.verify()
        assert attacher.stats.self_test_error is None


@links
def test_without_descriptors_for_its_links_a_file_is_tried_again_until_there_are_some(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any, wait_until: Any, links: str
) -> None:
    library = probed()
    process = caller(library)
    file = active(library)
    with Attacher(user_object, {"plain": "by_section"}, links=links) as attacher:
        ring = attacher.ring("events")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # One more may be opened: the attacher's own of the file.
        spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
        free = spare.pop()
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            attacher.attach(file)
            (view,) = attacher.files()
            (attachment,) = view.attachments
            assert (view.state, attachment.state) == ("retrying", "retrying")
            assert "Too many open files" in (view.reason or "")
            stats = attacher.stats
            assert (stats.expected, stats.attached, stats.failed) == (1, 0, 0)
            assert [one.is_permanent for one in attacher.failures] == [False]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(spare[0])
        wait_until(lambda: attacher.stats.attached == 1)
        assert attacher.stats.retries >= 1
        assert attacher.failures == []
        process.call("plain")
        assert len(list(ring.take())) == 1


class Refusing(ProbeObject):
    """The kernel refuses what is to be attached, so often."""

    times = 0
    number = 0

    def link_multi(self, *args: Any, **options: Any) -> Link:
        self._refuse()
        return super().link_multi(*args, **options)

    def link_one(self, *args: Any, **options: Any) -> Link:
        self._refuse()
        return super().link_one(*args, **options)

    @classmethod
    def _refuse(cls) -> None:
        if cls.times:
            cls.times -= 1
            raise BpfError("attaching by_section", cls.number)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """``refuse(number, times)``: what this machine has no way to bring about, such as too little memory."""
    monkeypatch.setattr("sowatch.uprobes.attacher.ProbeObject", Refusing)
    monkeypatch.setattr("sowatch.uprobes.attached.FIRST_RETRY_S", 0.01)

    def arm(number: int, times: int) -> None:
        Refusing.number, Refusing.times = number, times

    yield arm
    Refusing.times = 0


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EBUSY, errno.EAGAIN, errno.ESRCH])
def test_what_the_surroundings_refuse_is_tried_again_later_each_time(
    user_object: Path, probed: Probed, active: Any, wait_until: Any, refuse: Any, number: int
) -> None:
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        refuse(number, 4)
        attacher.attach(active(probed()))
        assert attacher.stats.attached == 0
        wait_until(lambda: attacher.stats.attached == 1)
        assert attacher.stats.retries == 4


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, 524])
def test_what_can_never_be_attached_refuses_the_file_with_the_reason_and_leaves_nothing(
    user_object: Path, probed: Probed, active: Any, refuse: Any, number: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        file = active(probed())
        refuse(number, 99)
        with pytest.raises(SowatchError, match=r"cannot attach to .*libprobed\.so: attaching by_section failed"):
            attacher.attach(file)
        (view,) = attacher.files()
        assert (view.state, attacher.stats.files, attacher.stats.refused) == ("failed", 0, 1)
        refuse(number, 0)
        attacher.attach(file)
        assert (attacher.stats.attached, attacher.stats.refused) == (1, 0)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the test's own of the file


def test_of_optional_probes_each_is_attached_on_its_own(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any, refuse: Any
) -> None:
    library = probed()
    process = caller(library)
    probes = best_effort({"plain": "by_section", "nested": "by_section", "no_such_function": "by_section"})
    with Attacher(user_object, probes) as attacher:
        ring = attacher.ring("events")
        refuse(errno.EINVAL, 2 if has_uprobe_multi() else 1)  # both in one link, then the first alone
        attacher.attach(active(library))
        states = {one.symbol: one.state for one in attacher.files()[0].attachments}
        assert sorted(states.values()) == ["attached", "failed", "failed"]
        assert states["no_such_function"] == "failed"
        process.call("nested")
        assert len(list(ring.take())) == 1


def test_a_file_that_the_attacher_cannot_keep_open_is_no_fault_of_the_file(
    user_object: Path, probed: Probed, active: Any
) -> None:
    file = active(probed())
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, hard))
        try:
            with pytest.raises(EnvironmentFault, match="ulimit -n"):
                attacher.attach(file)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (attacher.stats.files, attacher.stats.refused) == (0, 0)


@pytest.mark.parametrize("moment", ["before its links", "after its links"])
def test_a_file_that_is_attached_while_the_attacher_closes_is_detached(
    user_object: Path, probed: Probed, active: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    file = active(probed())
    before = set(os.listdir("/proc/self/fd"))
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        plan, link = Attacher._plan, Linker.link

        def close_and_plan(self: Attacher, *arguments: Any) -> Any:
            found = plan(self, *arguments)
            self.close()
            return found

        def link_and_close(self: Linker, *arguments: Any) -> Any:
            found = link(self, *arguments)
            attacher.close()
            return found

        if moment == "before its links":
            monkeypatch.setattr(Attacher, "_plan", close_and_plan)
        else:
            monkeypatch.setattr(Linker, "link", link_and_close)
        with pytest.raises(EnvironmentFault, match="the attacher was closed before"):
            attacher.attach(file)
        assert attacher.files() == []
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_program_is_on_one_place_once_by_whatever_names_it_was_asked_for(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    process = caller(library)
    probes = [Probe("plain", "by_section"), Probe("pl[a]in", "by_section", is_optional=True)]
    for links in ("auto", "perf_event"):
        with Attacher(user_object, probes, links=links) as attacher:
            ring = attacher.ring("events")
            attacher.attach(active(library))
            process.call("plain", times=3)
            assert len(list(ring.take())) == 3


def test_many_threads_that_attach_and_detach_one_file_leave_nothing(
    user_object: Path, probed: Probed, active: Any
) -> None:
    library = probed()
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        files = [active(library, generation=3) for _ in range(8)]
        stop = threading.Barrier(len(files))

        def work(file: Any) -> None:
            for _ in range(5):
                stop.wait()
                attacher.attach(file)
                attacher.detach(file)

        threads = [threading.Thread(target=work, args=(file,)) for file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (attacher.stats.files, attacher.sites) == (0, {})
