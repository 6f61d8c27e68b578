"""One command in one guest: QEMU, with this machine's root shared read-only.

May import ``cache`` and ``packages``. Emulated (TCG) on purpose, without /dev/kvm: machines that are guests
themselves often offer a kind of KVM on which these kernels do not come up. One emulating thread and no cx16,
because with more of them QEMU 7.2 breaks the guest's lock cmpxchg16b, and so its allocator, now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

from matrix.cache import ROOT, cache_directory
from matrix.packages import Unpacked
from outside import OutsideError

__all__ = ["GuestHangs", "is_hung", "run_guest"]

_STAGE2: Final = Path(__file__).with_name("stage2")
_MEMORY: Final = "2G"
_SETUP: Final = "Run `scripts/setup --for matrix`."
#: CPU time that a guest may take for one step: several times what any takes. How fast the machine is does not matter.
_STEP_CPU_S: Final = 600.0
#: A guest that waits takes next to none: how long it may, and what it takes at most of a CPU meanwhile. The longest
#: deadline of a test is half of this there.
_IDLE_S: Final = 1200.0
_IDLE_SHARE: Final = 0.1
_CHECK_S: Final = 5.0
#: A crashed guest ends at once. Lockdown and mitigations are not what is tested, and cost time.
_ARGUMENTS: Final = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off tsc=reliable"


class GuestHangs(Exception):
    """A guest does not get on, which is not the same as being slow."""


async def run_guest(
    kernel: Unpacked,
    image: Path,
    command: Sequence[str],
    out: Path,
    *,
    progress: Callable[[], object] | None,
    arguments: str = "",
) -> int | None:
    """Boots a guest, runs the command in the checkout's directory, powers it off.

    Args:
        kernel: to boot.
        image: its initramfs.
        command: and its arguments; paths are those of the host. It can write to /tmp, /var/tmp and /run/out.
        out: a directory of the host, in the guest as /run/out. Gets ``console.log`` and what the command writes.
        progress: gives a value that changes as long as the guest gets on; if it does not, the guest is killed.
            None: the terminal is the guest's, until it ends.
        arguments: more words for the kernel's command line.

    Returns:
        The command's exit code, None if the guest died before the command ended.

    Raises:
        GuestHangs: there was no progress; the guest is gone.
        OutsideError: QEMU or virtiofsd is missing or did not start.
    """
    _lay_out(kernel, command, out, is_interactive=progress is None)
    qemu = _find("qemu-system-x86_64")
    async with contextlib.AsyncExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sowatch-guest-")))
        for tag, source, cached in (("root", Path("/"), "always"), ("out", out, "none")):
            await stack.enter_async_context(_share(sockets / tag, source, cached, out / f"virtiofsd-{tag}.log"))
        keep = ":".join(str(path) for path in (ROOT, cache_directory()))
        append = f"{_ARGUMENTS} sowatch.keep={keep} sowatch.then={_STAGE2} {arguments}"
        argv = [*_machine(qemu, sockets), "-kernel", str(kernel.image), "-initrd", str(image), "-append", append]
        with (out / "console.log").open("wb") as console:
            streams = (
                {} if progress is None else {"stdin": asyncio.subprocess.DEVNULL, "stdout": console, "stderr": console}
            )
            process = await stack.enter_async_context(_running(argv, **streams))
            if progress is None:
                await process.wait()
            else:
                await _until_it_ends(process, progress)
    return _exit_code(out)


async def _until_it_ends(process: asyncio.subprocess.Process, progress: Callable[[], object]) -> None:
    """Waits for the end, however long the guest takes as long as it gets on.

    Raises:
        GuestHangs: it does not.
    """
    seen, since_s, since_cpu_s = progress(), time.monotonic(), 0.0
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _CHECK_S)
            return
        now, now_s, cpu_s = progress(), time.monotonic(), _cpu_s(process.pid)
        if now != seen:
            seen, since_s, since_cpu_s = now, now_s, cpu_s
        elif is_hung(now_s - since_s, cpu_s - since_cpu_s):
            raise GuestHangs(
                f"no progress for {now_s - since_s:.0f} s, in which it took {cpu_s - since_cpu_s:.0f} s of CPU"
            )


def is_hung(waited_s: float, cpu_s: float) -> bool:
    """Whether a guest without progress for so long hangs: it computes without end, or waits without end.

    One that waits for a CPU of this machine does neither.
    """
    return cpu_s >= _STEP_CPU_S or (waited_s >= _IDLE_S and cpu_s < _IDLE_SHARE * waited_s)


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _lay_out(kernel: Unpacked, command: Sequence[str], out: Path, *, is_interactive: bool) -> None:
    """Writes what ``stage2`` reads."""
    out.mkdir(parents=True, exist_ok=True)
    for left in ("rc", "interactive"):
        (out / left).unlink(missing_ok=True)
    words = " ".join(map(shlex.quote, command))
    (out / "command").write_text(f"cd {shlex.quote(str(ROOT))} && exec {words}\n", encoding="utf-8")
    (out / "modules").write_text(f"{kernel.module_root}\n", encoding="utf-8")
    if is_interactive:
        (out / "interactive").touch()


def _exit_code(out: Path) -> int | None:
    rc = out / "rc"
    return int(rc.read_text(encoding="ascii")) if rc.exists() else None


def _machine(qemu: str, sockets: Path) -> list[str]:
    shared = [
        word
        for tag in ("root", "out")
        for word in (
            *("-chardev", f"socket,id={tag},path={sockets / tag}"),
            *("-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"),
        )
    ]
    return [
        qemu,
        *("-accel", "tcg,thread=single", "-cpu", "max,la57=off,cx16=off", "-M", "q35", "-smp", "2", "-m", _MEMORY),
        # virtiofs wants the guest's memory in a file that virtiofsd maps too.
        *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on", "-numa", "node,memdev=memory"),
        *shared,
        *(
            "-nodefaults",
            "-nographic",
            "-no-reboot",
            "-serial",
            "stdio",
            "-monitor",
            "none",
            "-device",
            "virtio-rng-pci",
        ),
    ]


@contextlib.asynccontextmanager
async def _share(socket: Path, source: Path, cached: str, log: Path) -> AsyncIterator[None]:
    """A virtiofsd for one directory. It ends by itself when its guest does."""
    argv = [_find("virtiofsd", "/usr/lib/qemu", "/usr/libexec"), f"--socket-path={socket}"]
    # These spellings are understood by the C program of QEMU 7 and by the one in Rust that came after it.
    argv += ["-o", f"source={source}", "-o", f"cache={cached}", "-o", "sandbox=chroot"]
    with log.open("wb") as words:
        async with _running(argv, stdin=asyncio.subprocess.DEVNULL, stdout=words, stderr=words) as process:
            async with asyncio.timeout(30):
                # It tells nobody when it listens.
                while not socket.exists():  # noqa: ASYNC240 - takes no time
                    if process.returncode is not None:
                        raise OutsideError(f"virtiofsd did not start, see {log}. It needs root.")
                    await asyncio.sleep(0.02)
            yield


@contextlib.asynccontextmanager
async def _running(argv: Sequence[str], **streams: object) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*argv, **streams)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _find(program: str, *directories: str) -> str:
    found = shutil.which(program, path=os.pathsep.join([*directories, os.environ["PATH"]]))
    if found is None:
        raise OutsideError(f"{program} is not installed. {_SETUP}")
    return found
