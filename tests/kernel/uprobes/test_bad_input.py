"""Bad input gets an error that ends with the next step, and leaves nothing attached."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Watcher
from sowatch.model.errors import BpfError, SowatchError, UsageError
from sowatch.uprobes import Attacher, CallCounter

Probed = Callable[..., Path]

#: Where the fields of an Elf64_Shdr stand: sh_offset and sh_size, and those of Elf64_Ehdr that are of use here.
SECTION_TABLE_AT, SECTION_BYTES, SECTION_COUNT_AT = 40, 64, 60


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (18, 40, r"it is for ARM \(32-bit\)"),
        (18, 183, "it is for AArch64"),
        (18, 9999, "it is for machine 9999"),
        (4, 1, "it is for x86-64, and this machine is"),  # ELFCLASS32
        (5, 2, "it is for machine 15872"),  # big-endian
    ],
)
def test_a_file_for_another_machine_is_refused(
    user_object: Path, probed: Probed, active: Any, at: int, value: int, reason: str
) -> None:
    foreign = probed()
    with foreign.open("r+b") as file:
        file.seek(at)
        file.write(value.to_bytes(1 if at < 16 else 2, "little"))
    attacher = Attacher(user_object, {"plain": "by_section"})
    with attacher, pytest.raises(SowatchError, match=f"{reason}.*Only files of this machine's kind can be probed"):
        attacher.attach(active(foreign))


def test_an_elf_bomb_is_read_within_bounds(user_object: Path, probed: Probed, active: Any, deadline: Any) -> None:
    """Every section claims a terabyte, in a sparse file of that size; what ld.so sees of symbols is what counts."""
    bomb = probed()
    with bomb.open("r+b") as file:
        data = file.read()
        table = int.from_bytes(data[SECTION_TABLE_AT : SECTION_TABLE_AT + 8], "little")
        for number in range(int.from_bytes(data[SECTION_COUNT_AT : SECTION_COUNT_AT + 2], "little")):
            file.seek(table + SECTION_BYTES * number + 32)  # sh_size
            file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 40)
    begun = time.monotonic()
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        attacher.attach(active(bomb))
        assert attacher.stats.attached == 1
    hidden = Attacher(user_object, {"hidden": "by_section"})  # in .symtab only
    with hidden, pytest.raises(SowatchError, match=r"cannot probe .*hidden: "):
        hidden.attach(active(bomb))
    assert time.monotonic() - begun < deadline(5.0)


def test_a_program_without_a_matching_section_is_a_usage_error(user_object: Path) -> None:
    with pytest.raises(UsageError, match=r"has no program 'nobody'\. It has: by_section, uretprobe__nested"):
        Attacher(user_object, {"plain": "nobody"}).start()


@pytest.mark.parametrize("content", [b"", b"no object", b"\x7fELF" + bytes(60)])
def test_what_is_no_bpf_object_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.bpf.o"
    path.write_bytes(content)
    with pytest.raises(BpfError, match=r"broken\.bpf\.o"):
        Attacher(path, {"plain": "by_section"}).start()
    with pytest.raises(BpfError, match=r"absent\.bpf\.o"):
        Attacher(tmp_path / "absent.bpf.o", {"plain": "by_section"}).start()


def test_a_library_that_nobody_has_waits_and_costs_nothing(user_object: Path, tmp_path: Path) -> None:
    counter = CallCounter(["plain"])
    with counter, Watcher(counter.rule(re.escape(str(tmp_path / "libnobody.so")))) as watcher:
        assert watcher.wait(timeout_s=0.2) is False
        assert (counter.stats.files, counter.calls(), counter.failures) == (0, [], [])


def test_without_permission_it_is_said_which_capability_is_missing(user_object: Path) -> None:
    code = (
        "from sowatch.uprobes import Attacher\n"
        f"try: Attacher({str(user_object)!r}, {{'plain': 'by_section'}}).start()\n"
        "except Exception as error: print(type(error).__name__, error.exit_code, error)\n"
    )
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("NotPermitted 3 cannot load the probes: missing CAP_PERFMON and CAP_BPF."), done
    assert "sudo" in done.stdout


def test_the_verifiers_last_lines_are_in_the_message(tmp_path: Path) -> None:
    source = tmp_path / "bad.bpf.c"
    source.write_text(
        '#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\nchar LICENSE[] SEC("license") = "GPL";\n'
        'SEC("uprobe/plain") int bad(void *context) { return *(int *)((char *)context + 4096); }\n'
    )
    made = tmp_path / "bad.bpf.o"
    include = subprocess.run(["cc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    command = ["clang", "-target", "bpf", "-O2", "-g", "-idirafter", f"/usr/include/{include}"]
    subprocess.run([*command, "-c", source, "-o", made], check=True)
    with pytest.raises(BpfError) as caught:
        Attacher(made).start()
    message = str(caught.value)
    assert str(made) in message
    assert "off=4096" in message.splitlines()[-2]
    assert "invalid bpf_context access" in message
    assert message.endswith("Correct the program, or see `sowatch doctor` for what this kernel can do.")
