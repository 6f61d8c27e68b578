"""An attacher puts a user's own programs on functions, once for each real file, and keeps them there."""

from __future__ import annotations

import os
import re
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from sowatch import FileId, Library, Watcher
from sowatch.engine.workers import ActiveFile
from sowatch.model.errors import BpfError, EnvironmentFault, SowatchError, UsageError
from sowatch.uprobes import Attacher, CallCounter, Probe
from support import bpfsys
from support.callers import Caller

Probed = Callable[..., Path]
NewCaller = Callable[..., Caller]
EVENT = struct.Struct("=QII")


def test_programs_go_where_their_sections_and_names_say(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    process = caller(library)
    with Attacher(
        user_object, prepare=lambda loaded, _: loaded.set_constant("add", (5).to_bytes(4, "little"))
    ) as attacher:
        ring = attacher.ring("events")
        attacher.attach(active(library))
        process.call("nested", 10, times=2)
        records = [EVENT.unpack(record) for record in ring.take()]
        sites = attacher.sites
        assert [(sites[cookie].symbol, tgid, argument) for cookie, tgid, argument in records] == [
            ("plain", process.pid, 15)
        ] * 2
        returns = attacher.map("returns")
        assert returns.lookup((12).to_bytes(4, "little")) == (2).to_bytes(8, "little")


def test_symbols_may_be_given_by_the_caller(user_object: Path, probed: Probed, caller: NewCaller, active: Any) -> None:
    library = probed()
    process = caller(library)
    with Attacher(user_object, {"recursive": "by_section"}) as attacher:
        ring = attacher.ring("events")
        attacher.attach(active(library))
        process.call("recursive", 3)
        assert [EVENT.unpack(record)[2] for record in ring.take()] == [3, 2, 1, 0]


def test_two_users_of_one_file_are_one_attachment_until_the_last_has_gone(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    process = caller(library)
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        ring = attacher.ring("events")
        first, second = active(library), active(library)
        attacher.attach(first)
        attacher.attach(second)
        process.call("plain")
        assert len(list(ring.take())) == 1
        attacher.detach(first)
        process.call("plain")
        assert len(list(ring.take())) == 1
        attacher.detach(second)
        process.call("plain")
        assert (list(ring.take()), attacher.stats.files) == ([], 0)


def test_one_file_in_many_overlays_is_counted_once_a_call(
    probed: Probed, caller: NewCaller, scratch: Path, closing: Any, wait_until: Any, programs: Any
) -> None:
    # Mounted in a namespace of their own, where the callers start, so that nothing has to be unmounted.
    lower = probed("lower/libprobed.so").parent
    tops = []
    for number in range(3):
        top = scratch / f"c{number}"
        for name in ("upper", "work", "merged"):
            (top / name).mkdir(parents=True)
        tops.append(top)
    script = "".join(
        f"mount -t overlay o -o lowerdir={lower},upperdir={top}/upper,workdir={top}/work {top}/merged || exit 1\n"
        for top in tops
    )
    counter = closing.enter_context(CallCounter(["plain"]))
    closing.enter_context(Watcher(counter.rule(r"/merged/libprobed\.so$")))
    pids = []
    for top in tops:
        wrapper = scratch / f"run-{top.name}"
        wrapper.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{script} exec {programs['caller']}'\n")
        wrapper.chmod(0o755)
        process = Caller(closing.enter_context(_Spawn()), wrapper, top / "merged" / "libprobed.so")
        pids.append((process, process.pid))
    wait_until(lambda: counter.stats.attached == 2 and counter.stats.files == 1)
    for process, _ in pids:
        process.call("plain", times=4)
    assert {one.process.pid: one.calls for one in counter.calls()} == {pid: 4 for _, pid in pids}


class _Spawn:
    """Starts processes as the fixture ``spawn`` does, and ends them before the watch ends."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __call__(self, argv: Any, **options: Any) -> subprocess.Popen[str]:
        self._started.append(subprocess.Popen(argv, **options))
        return self._started[-1]

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def test_a_link_that_the_kernel_lost_is_attached_anew(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    process = caller(library)
    with Attacher(user_object, {"plain": "by_section"}, verify_s=3600.0) as attacher:
        ring = attacher.ring("events")
        attacher.attach(active(library))
        (file,) = attacher._files.values()
        file.groups[0].link.close()
        assert attacher.stats.repaired == 0
        assert attacher.verify() == 1
        process.call("plain")
        assert (len(list(ring.take())), attacher.stats.repaired, attacher.stats.attached) == (1, 1, 1)


def test_a_missing_function_is_said_with_its_neighbours_and_nothing_is_attached(
    user_object: Path, probed: Probed, active: Any
) -> None:
    library = probed()
    with Attacher(user_object, {"plane": "by_section"}) as attacher:
        with pytest.raises(SowatchError, match=r"plane: there is no such function\. Near: plain"):
            attacher.attach(active(library))
        assert attacher.stats.files == 0


def test_a_missing_function_that_is_optional_does_not_keep_the_others_away(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    process = caller(library)
    probes = [Probe("no_such_function", "by_section", is_optional=True), Probe("plain", "by_section")]
    with Attacher(user_object, probes) as attacher:
        ring = attacher.ring("events")
        attacher.attach(active(library))
        process.call("plain")
        assert len(list(ring.take())) == 1
        assert [(one.symbol, one.is_permanent) for one in attacher.failures] == [("no_such_function", True)]


def test_files_are_shown_with_the_state_of_each_probe_and_the_reason(
    user_object: Path, probed: Probed, active: Any
) -> None:
    probes = [Probe("no_such_function", "by_section", is_optional=True), Probe("plain", "by_section")]
    good, text = active(probed()), active(_text_file(probed))
    with Attacher(user_object, probes) as attacher:
        attacher.attach(good)
        with pytest.raises(SowatchError):
            attacher.attach(text)
        attached, refused = attacher.files()
        assert [(one.symbol, one.state, one.reason) for one in attached.attachments] == [
            ("plain", "attached", None),
            ("no_such_function", "failed", "there is no such function"),
        ]
        assert (attached.library, attached.state, attached.users) == (good.library, "attached", 1)
        assert (refused.library, refused.state, refused.users) == (text.library, "failed", 0)
        assert "it is no ELF file" in refused.reason
        stats = attacher.stats
        assert (stats.files, stats.expected, stats.attached, stats.failed, stats.refused) == (1, 1, 1, 1, 1)


def _text_file(probed: Probed) -> Path:
    text = probed("libtext.so")
    text.write_bytes(b"/* GNU ld script */")
    return text


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [("indirect", "it is indirect"), ("data", "it is no function"), ("longjmp", "it is imported here")],
)
def test_what_must_not_be_probed_is_refused_with_the_reason(
    user_object: Path, probed: Probed, active: Any, symbol: str, reason: str
) -> None:
    with Attacher(user_object, {symbol: "by_section"}) as attacher, pytest.raises(SowatchError, match=reason):
        attacher.attach(active(probed()))


def test_a_file_for_another_machine_and_one_that_is_no_elf_file_are_refused(
    user_object: Path, probed: Probed, active: Any
) -> None:
    foreign = probed("libforeign.so")
    with foreign.open("r+b") as file:
        file.seek(18)  # e_machine
        file.write((40).to_bytes(2, "little"))
    text = probed("libtext.so")
    text.write_bytes(b"/* GNU ld script */")
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        with pytest.raises(SowatchError, match=r"it is for ARM \(32-bit\)"):
            attacher.attach(active(foreign))
        with pytest.raises(SowatchError, match="it is no ELF file"):
            attacher.attach(active(text))


def test_without_descriptors_it_is_the_surroundings_fault_and_a_later_try_works(
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
        assert attacher.stats.files == 0
        attacher.attach(file)
        assert attacher.stats.attached == 1


def test_a_program_that_is_not_there_and_an_object_that_says_nothing_are_usage_errors(user_object: Path) -> None:
    with pytest.raises(UsageError, match=r"has no program 'nobody'\. It has: by_section, uretprobe__nested"):
        Attacher(user_object, {"plain": "nobody"}).start()
    with pytest.raises(UsageError, match="no probes are given"):
        Attacher(user_object, {}).start()


def test_an_object_that_the_verifier_refuses_shows_its_last_lines(tmp_path: Path) -> None:
    source = tmp_path / "bad.bpf.c"
    source.write_text(
        '#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\nchar LICENSE[] SEC("license") = "GPL";\n'
        'SEC("uprobe/plain") int bad(void *context) { return *(int *)((char *)context + 4096); }\n'
    )
    made = tmp_path / "bad.bpf.o"
    include = subprocess.run(["cc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(
        ["clang", "-target", "bpf", "-O2", "-g", "-idirafter", f"/usr/include/{include}", "-c", source, "-o", made],
        check=True,
    )
    with pytest.raises(BpfError, match="invalid bpf_context access") as caught:
        Attacher(made).start()
    assert "off=4096" in caught.value.log


def test_two_hundred_attached_files_are_detached_and_leave_nothing(
    user_object: Path, probed: Probed, active: Any
) -> None:
    files = [active(probed(f"lib{number}.so")) for number in range(200)]
    before = len(os.listdir("/proc/self/fd"))
    attacher = Attacher(user_object, {"plain": "by_section"}).start()
    for file in files:
        attacher.attach(file)
    assert attacher.stats.attached == 200
    attacher.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_after_kill_nothing_stays_attached(probed: Probed, caller: NewCaller, spawn: Any, wait_until: Any) -> None:
    library = probed()
    process = caller(library)
    code = (
        "from sowatch import Watcher; from sowatch.uprobes import CallCounter\n"
        f"counter = CallCounter(['plain']).start(); Watcher(counter.rule({re.escape(str(library))!r})).start()\n"
        "import time\n"
        "while counter.stats.attached < 2: time.sleep(0.01)\n"
        "ids = [g.link.program_id for f in counter.attacher._files.values() for g in f.groups]\n"
        "print(*ids, flush=True); time.sleep(600)"
    )
    victim = spawn([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    programs = {int(word) for word in victim.stdout.readline().split()}
    assert len(programs) == 2
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    wait_until(
        lambda: not programs & set({number for kind, number in bpfsys.all_ids() if kind == "prog"}),
        what="the programs are gone",
    )
    process.call("plain")


def test_a_memfd_is_probed(user_object: Path, probed: Probed, caller: NewCaller, spawn: Any, programs: Any) -> None:
    library = probed()
    fd = os.memfd_create("probed")
    with os.fdopen(fd, "wb", closefd=False) as memory:
        memory.write(library.read_bytes())
    try:
        process = Caller(spawn, programs["caller"], None, pass_fds=[fd])
        process.open(f"/proc/self/fd/{fd}")
        status = os.fstat(fd)
        file_id = FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
        with Attacher(user_object, {"plain": "by_section"}) as attacher:
            ring = attacher.ring("events")
            attacher.attach(ActiveFile(Library("/memfd:probed", file_id, deleted=True), fd))
            process.call("plain", 1)
            assert len(list(ring.take())) == 1
    finally:
        os.close(fd)
