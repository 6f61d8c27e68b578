"""How mappings come and go beyond ``test_programs``, ``test_races`` and ``test_identity``: libraries, calls, roots.

Each test has the whole story of its processes by the events, and then asks the audit, which reads ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.hostile import compile_c
from support.kernel import IN_OWN_MOUNTS, Ledger, host_pid, with_prelude
from support.lifecycle import (
    OURS,
    PYTHON,
    NewLibrary,
    Start,
    Story,
    inode,
    is_right,
    line,
    wait_story,
)

# ---- libraries ----------------------------------------------------------------------------------


def test_a_library_that_is_closed_and_opened_again_is_told_each_time(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    for _ in range(2):
        mapper.emit("dlclose", *mapper.emit("dlopen", new))
    (handle,) = mapper.emit("dlopen", new)
    mapper.emit("dlopen", new)
    mapper.emit("dlclose", handle)
    round_trip: Story = [("load", "mmap"), ("unload", "munmap")]
    wait_story(ledger, mapper.pid, inode(new), [*round_trip, *round_trip, ("load", "mmap")])
    is_right(ledger, mapper.pid)


@pytest.mark.alone
def test_threads_that_open_and_close_libraries_at_once_leave_a_balanced_story(
    ledger: Ledger, spawn: Any, programs: Any, library: NewLibrary
) -> None:
    libraries = [library(f"lib{number}.so") for number in range(4)]
    churn = spawn([programs["churn"], "4", "100", *libraries], stdout=subprocess.DEVNULL)
    assert churn.wait() == 0
    ledger.wait_for(
        lambda: ledger.of(churn.pid) and not ledger.inodes(churn.pid),
        lambda: f"churn has ended and has {ledger.inodes(churn.pid)}",
    )
    assert all(ledger.story(churn.pid, inode(one)) for one in libraries)


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "LD_AUDIT"])
def test_a_library_that_the_environment_names_is_told(
    ledger: Ledger, scratch: Path, spawn: Any, programs: Any, make_library: Any, variable: str
) -> None:
    # la_version gives its place in the list: 1, the oldest interface there is.
    named = Path(shutil.copy(make_library("libnamed.so", exports=("unused", "la_version")), scratch))
    loader = spawn([programs["loader"]], env={**os.environ, variable: os.fspath(named)})
    assert loader.wait() == 0
    wait_story(ledger, loader.pid, inode(named), [("load", "mmap"), ("unload", "exit")])


def test_a_library_in_a_second_link_map_is_one_file_that_stays_until_both_are_closed(
    ledger: Ledger, run: Any, library: NewLibrary
) -> None:
    new = library()
    source = """int main(int c, char **v) { (void)c; char byte;
        void *one = dlopen(v[1], RTLD_NOW), *two = dlmopen(LM_ID_NEWLM, v[1], RTLD_NOW);
        if (!one || !two || one == two) return 1;
        say(1); if (read(0, &byte, 1) != 1) return 1;
        dlclose(one); say(2); if (read(0, &byte, 1) != 1) return 1;
        dlclose(two); say(3); stay(); return 0; }"""
    process = run(source, new)
    line(process)
    load = ledger.wait_load(process.pid, inode(new))
    process.stdin.write(b"x")
    line(process)
    is_right(ledger, process.pid)
    assert ledger.wait_load(process.pid, inode(new)) is load
    process.stdin.write(b"x")
    line(process)
    wait_story(ledger, process.pid, inode(new), [("load", "mmap"), ("unload", "munmap")])
    is_right(ledger, process.pid)


@pytest.mark.parametrize("kind", ["file", "deleted", "memfd"])
def test_a_library_opened_by_its_descriptor_has_the_name_that_the_kernel_knows(
    ledger: Ledger, spawn: Any, library: NewLibrary, kind: str
) -> None:
    new = library()
    number = inode(new)
    opened = {
        "file": "fd = os.open(name, os.O_RDONLY)",
        "deleted": "fd = os.open(name, os.O_RDONLY); os.unlink(name)",
        "memfd": "fd = os.memfd_create('in memory'); os.write(fd, open(name, 'rb').read())",
    }[kind]
    script = f"import ctypes, os, sys\nname = sys.argv[1]\n{opened}\nctypes.CDLL(f'/proc/self/fd/{{fd}}')\n"
    script += "print(os.fstat(fd).st_ino, flush=True)\nsys.stdin.read()"
    process = spawn([PYTHON, "-S", "-c", script, new], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    found = line(process)
    load = ledger.wait_load(process.pid, found)
    assert (found == number) == (kind != "memfd")
    assert load.library.path == ("/memfd:in memory" if kind == "memfd" else str(new))
    assert load.library.deleted == (kind != "file")
    assert load.library.kind == "library"
    assert load.library.soname == "libtemplate.so"
    is_right(ledger, process.pid)


@pytest.mark.parametrize("flag", ["-static-pie", "-static"])
def test_a_static_program_is_an_executable_without_interpreter_and_what_it_maps_is_told(
    ledger: Ledger, start: Start, scratch: Path, programs: Any, library: NewLibrary, flag: str
) -> None:
    program = scratch / "static-program"
    shutil.copy(programs.variant("mapper", flag), program)
    mapper, new = start(program), library()
    mapper.map(new)
    wait_story(ledger, mapper.pid, inode(new), [("load", "mmap")])
    assert [(one.library.kind, one.cause) for one in ledger.of(mapper.pid)] == [
        ("executable", "exec"),
        ("library", "mmap"),
    ]
    is_right(ledger, mapper.pid)
    mapper.exit()
    wait_story(ledger, mapper.pid, inode(new), [("load", "mmap"), ("unload", "exit")])


# ---- system calls -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["protect", "pkeyprotect"])
def test_execute_rights_that_come_and_go_are_loads_and_unloads(
    ledger: Ledger, start: Start, library: NewLibrary, call: str
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new, "noexec")
    for protection in ("rx", "r", "rwx", "rx"):
        mapper.emit(call, f"{at:x}", length, protection)
    wait_story(ledger, mapper.pid, inode(new), [("load", "mmap"), ("unload", "munmap"), ("load", "mmap")])
    is_right(ledger, mapper.pid)


def test_a_file_mapped_over_another_takes_its_place(ledger: Ledger, start: Start, library: NewLibrary) -> None:
    mapper, first, second = start(), library("libfirst.so"), library("libsecond.so")
    at, _ = mapper.map(first)
    mapper.map(second, "at", f"{at:x}")
    wait_story(ledger, mapper.pid, inode(second), [("load", "mmap")])
    assert ledger.story(mapper.pid, inode(first)) == [("load", "mmap"), ("unload", "munmap")]
    is_right(ledger, mapper.pid)


PROGRAM_32 = r"""
static int call(int number, int a, int b, int c, int d, int e)
{
    int result;
    __asm__ volatile("push %%ebp; xor %%ebp, %%ebp; int $0x80; pop %%ebp" : "=a"(result)
             : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
    return result;
}
void _start(void)
{
    char byte = '1';
    int fd, at;
    byte = '1';
    fd = call(5, (int)NAME, 0, 0, 0, 0);
    at = call(192, 0, 4096, 5, 2, fd);
    byte = (unsigned)at > 0xfffff000u ? 'e' : '1';
    call(4, 1, (int)&byte, 1, 0, 0);
    call(4, 1, (int)"\n", 1, 0, 0);
    call(3, 0, (int)&byte, 1, 0, 0);
    call(91, at, 4096, 0, 0, 0);
    call(4, 1, (int)"2\n", 2, 0, 0);
    call(3, 0, (int)&byte, 1, 0, 0);
    call(1, 0, 0, 0, 0, 0);
}
"""


def test_what_a_32_bit_program_maps_and_unmaps_is_found(
    ledger: Ledger, scratch: Path, spawn: Any, library: NewLibrary
) -> None:
    new = library()
    flags = ["-m32", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie"]
    flags += ["-fomit-frame-pointer", f'-DNAME="{new}"']
    try:
        program = compile_c(PROGRAM_32, scratch / "program32", *flags)
        process = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no 32-bit programs here: {error}")
    assert line(process) == 1
    load = ledger.wait_load(process.pid, inode(new))
    assert load.library.path == str(new)
    is_right(ledger, process.pid)
    process.stdin.write(b"x")
    assert line(process) == 2
    ledger.wait_unload(process.pid, inode(new))
    is_right(ledger, process.pid)
    assert any("32-bit" in limit for limit in ledger.ready.limits)


# ---- roots, mounts, namespaces ------------------------------------------------------------------


def test_after_pivot_root_paths_are_those_of_the_new_root_and_the_host_can_open_them(
    ledger: Ledger, start: Start, scratch: Path, library: NewLibrary, programs: Any
) -> None:
    outside = library(f"root/{OURS}/libnew.so")
    shutil.copy(programs.variant("mapper", "-static"), scratch / "root/mapper")
    commands = f"""
    mount --bind {scratch}/root {scratch}/root
    cd {scratch}/root
    mkdir old
    /sbin/pivot_root . old || /usr/sbin/pivot_root . old
    exec /mapper "$0"
    """
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    path = f"/{OURS}/libnew.so"
    mapper.map(path)
    load = ledger.wait_load(mapper.pid, inode(outside))
    assert load.library.path == path
    assert load.library.host_path is not None
    assert os.path.samefile(load.library.host_path, outside)
    assert load.library.soname == "libtemplate.so"
    is_right(ledger, mapper.pid)


def test_a_process_in_a_user_and_a_pid_namespace_is_told_by_the_numbers_of_the_host(
    ledger: Ledger, start: Start, scratch: Path, library: NewLibrary, programs: Any
) -> None:
    new = library()
    new.chmod(0o755)
    program = scratch / "program"
    shutil.copy(programs["mapper"], program)
    launcher = "setpriv --reuid 65534 --clear-groups unshare --user --map-root-user --pid --fork --kill-child sh -c"
    mapper = start(with_prelude(scratch, program, "", launcher=launcher))
    pid = host_pid(mapper)
    mapper.map(new)
    load = ledger.wait_load(pid, inode(new))
    assert load.process is not None
    assert (load.process.ns_pid, load.process.uid) == (1, 65534)
    is_right(ledger, pid)
    mapper.exit()
    wait_story(ledger, pid, inode(new), [("load", "mmap"), ("unload", "exit")])


def test_a_file_under_two_bind_mounts_is_active_once_and_told_by_both_paths(
    ledger: Ledger, start: Start, scratch: Path, library: NewLibrary, programs: Any, closing: contextlib.ExitStack
) -> None:
    real = library("real/libnew.so")
    commands = f"mkdir {scratch}/bound; mount --bind {scratch}/real {scratch}/bound"
    first = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    second = closing.enter_context(first.fork())
    first.map(real)
    second.map(scratch / "bound/libnew.so")
    loads = [ledger.wait_load(one.pid, inode(real)) for one in (first, second)]
    assert loads[0].library.id == loads[1].library.id
    assert [one.library.path for one in loads] == [str(real), str(scratch / "bound/libnew.so")]
    activations = [one for one in ledger.events if one.event == "activate" and one.library.id == loads[0].library.id]
    assert len(activations) == 1
    is_right(ledger, first.pid, second.pid)
