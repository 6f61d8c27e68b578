"""The kernels of the matrix and what each must show. Plain data: this is the file to edit. Imports nothing.

A feature or a strategy that a guest shows and the table does not, or the other way round, fails the run: so
nothing is skipped, and nothing falls back to something weaker, without anybody noticing. After a change, run
``scripts/matrix --write``, which also writes docs/kernels.md anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "CELLS",
    "CHOICES",
    "CI_KERNELS",
    "CI_WITHOUT_CELLS",
    "FEATURES",
    "HELPERS",
    "KERNELS",
    "KNOWN_FAULTS",
    "TESTS",
    "Cell",
    "Kernel",
    "KnownFault",
]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest's kernel: the newest cloud kernel of a Debian suite.

    ``may_be_absent``: the suite changes every day, and for hours its packages may not fit together. Then the
    guest is not run, which is said and is no failure.
    """

    name: str
    suite: str
    may_be_absent: bool = False


KERNELS: Final = (
    Kernel("5.10", "bullseye"),
    Kernel("6.1", "bookworm"),
    Kernel("6.12", "trixie"),
    Kernel("newest", "sid", may_be_absent=True),
)
#: What `.ci/run` has time for, the most telling first: the oldest and the oldest with all hooks; then the newest, but
#: there only `TESTS`.
CI_KERNELS: Final = ("5.10", "6.1", "newest")
CI_WITHOUT_CELLS: Final = frozenset({"newest"})

_ALL: Final = frozenset(kernel.name for kernel in KERNELS)
_FROM_6_1: Final = _ALL - {"5.10"}
_FROM_6_12: Final = _FROM_6_1 - {"6.1"}

#: What is asked beyond `sowatch doctor`: BPF helpers by number (enum bpf_func_id), tried in a program of a
#: type of this number (enum bpf_prog_type).
HELPERS: Final[Mapping[str, tuple[int, int]]] = {
    # BPF_PROG_TYPE_TRACEPOINT
    "task storage (5.11)": (5, 156),
}

#: Feature, as a probe of `sowatch doctor` calls it, a name in `HELPERS`, or an object of the BPF programs
#: (which is there if all of it loads): the kernels that have it.
FEATURES: Final[Mapping[str, frozenset[str]]] = {
    "libbpf": _ALL,
    "kernel BTF": _ALL,
    "BPF programs on tracepoints": _ALL,
    "ring buffer (5.8)": _ALL,
    "LRU map": _ALL,
    "tracefs with system call tracepoints": _ALL,
    "bpf_find_vma (5.17)": _FROM_6_1,
    "bpf_loop (5.17)": _FROM_6_1,
    "typed tracepoints (5.5)": _ALL,
    "mapping iterator (5.12)": _FROM_6_1,
    "trampolines (fentry, 5.5)": _ALL,
    "initial pid namespace": _ALL,
    "uprobes": _ALL,
    "uprobe.multi (6.6)": _FROM_6_12,
    "attach cookie (5.15)": _FROM_6_1,
    "perf-event uprobes with CAP_PERFMON": frozenset(),
    "return probes below seccomp filters": _ALL,
    "task storage (5.11)": _FROM_6_1,
    "watch.bpf.o": _FROM_6_12,
    "prebuilt.bpf.o": _ALL,
    "watch_probe.bpf.o": _FROM_6_1,
    "watch_old.bpf.o": _ALL,
    "probe_calls.bpf.o": _ALL,
    "tls_taps.bpf.o": _FROM_6_12,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy with one hook set.

    Args:
        strategy: as `sowatch doctor` and ``ready`` name it.
        hooks: likewise; None where the strategy has no choice of hooks.
        options: of the command that force this cell.
        works_on: kernels where it must be what is used.
        refused_on: kernels where it must be refused, with words that the reason must have.
        tests: run with these options wherever it works.
    """

    strategy: str
    hooks: str | None
    options: tuple[str, ...]
    works_on: frozenset[str]
    refused_on: Mapping[str, str] = field(default_factory=dict)
    tests: tuple[str, ...] = (
        "tests/e2e/test_commands.py::test_watch_tells_of_a_process_that_opens_a_library_and_ends",
        "tests/kernel/sources/test_conformance.py",
    )

    @property
    def name(self) -> str:
        """For people, and for the keys of what a guest writes down."""
        return self.strategy if self.hooks is None else f"{self.strategy}, {self.hooks} hooks"


#: Each start of a command takes some eight seconds there, so only core runs them all.
_ALL_COMMANDS: Final = ("tests/e2e/test_commands.py", "tests/kernel/sources/test_conformance.py")

CELLS: Final = (
    Cell(
        "core",
        "trampoline",
        ("--strategy", "core", "--hooks", "trampoline"),
        works_on=_FROM_6_1,
        refused_on={"5.10": "loading the BPF programs failed"},
        tests=_ALL_COMMANDS,
    ),
    Cell(
        "core",
        "syscall",
        ("--strategy", "core", "--hooks", "syscall"),
        works_on=_ALL,
        tests=_ALL_COMMANDS,
    ),
    # Its programs are core's, so the hooks that work everywhere are enough.
    Cell(
        "runtime",
        "syscall",
        ("--strategy", "runtime", "--hooks", "syscall"),
        works_on=_ALL,
    ),
    Cell(
        "prebuilt",
        "syscall",
        ("--strategy", "prebuilt"),
        works_on=_ALL,
    ),
    Cell(
        "procfs",
        None,
        ("--strategy", "procfs"),
        works_on=_ALL,
    ),
)

#: What a command without options must choose: (strategy, hooks), both None where nothing works.
CHOICES: Final[Mapping[str, tuple[str | None, str | None]]] = {
    "5.10": ("core", "syscall"),
    "6.1": ("core", "trampoline"),
    "6.12": ("core", "trampoline"),
    "newest": ("core", "trampoline"),
}

#: What runs in each guest where a strategy with BPF works. Everything takes some forty times as long there as
#: on the machine itself, so these are few: each kind of event, verdict, reading and loss once, and what kernels
#: keep in different places.
TESTS: Final = (
    "tests/kernel/bpf/test_programs.py",
    "tests/kernel/sources/test_legacy.py",
    "tests/kernel/engine/test_identity.py::test_on_an_ordinary_file_system_the_identity_is_that_of_stat",
    "tests/kernel/engine/test_identity.py::test_the_generation_is_the_one_of_ext4",
    "tests/kernel/engine/test_identity.py::test_one_lower_file_through_two_overlays_is_one_file_under_two_paths",
    "tests/kernel/engine/test_identity.py::test_one_btrfs_file_in_two_subvolumes_is_two_files",
    "tests/kernel/engine/test_identity.py::test_a_path_of_4000_bytes_is_told_whole",
    "tests/kernel/engine/test_identity.py::test_a_memfd_is_called_by_its_name_and_deleted[jit code]",
    "tests/kernel/bpf/test_tracking.py::test_an_ignored_file_is_dropped_in_the_kernel",
    "tests/kernel/bpf/test_tracking.py::test_a_matched_file_is_told_with_its_path_and_without_a_question",
    "tests/kernel/bpf/test_tracking.py::test_one_record_of_a_threaded_process_carries_the_dirty_flag_until_a_reading_clears_it",
    "tests/kernel/bpf/test_tracking.py::test_records_that_do_not_fit_into_the_ring_are_counted",
    "tests/kernel/bpf/test_tracking.py::test_a_record_and_a_reading_agree_on_every_field_of_a_mapping",
    "tests/kernel/bpf/test_tracking.py::test_a_reading_of_a_process_whose_leader_is_dead_shows_its_mappings_once",
    # uprobe.multi from 6.12 on, perf events with cookies on 6.1 and without on 5.10.
    "tests/kernel/http/test_flows.py::test_a_request_over_tls_is_seen_on_both_sides",
    "tests/kernel/http/test_peers.py",
    "tests/kernel/uprobes/test_calls.py::test_calls_of_a_process_that_runs_already_and_of_one_that_comes_are_counted",
    "tests/kernel/uprobes/test_calls.py::test_recursion_deeper_than_is_timed_is_counted_and_said",
    "tests/kernel/uprobes/test_calls.py::test_a_function_that_is_left_by_longjmp_leaves_nothing_that_falsifies_the_next_call",
    "tests/kernel/uprobes/test_calls.py::test_a_function_within_another_is_counted_on_its_own",
    # An agent whose rule counts, with the privileges that this takes there.
    "tests/e2e/test_serve_actions.py::test_calls_are_metrics_by_library_build_symbol_and_container_and_nothing_else",
    "tests/kernel/uprobes/test_prearm.py::test_the_first_call_of_the_first_process_counts",
    "tests/kernel/uprobes/test_returns.py::test_by_return_instructions_each_call_of_a_recursion_is_timed",
    "tests/kernel/uprobes/test_returns.py::test_a_process_below_a_seccomp_filter_survives_its_probes",
    "tests/kernel/uprobes/test_returns.py::test_whether_return_probes_can_kill_is_found_out_by_trying_and_decides",
    "tests/kernel/uprobes/test_truth.py::test_a_probe_of_our_own_runs_and_one_that_does_not_is_reported_and_made_anew",
)


@dataclass(frozen=True, slots=True)
class KnownFault:
    """A test that fails on some kernels, as JUnit names it. Once it passes there, the run says so and fails."""

    test: str
    kernels: frozenset[str]
    why: str


_OLD: Final = frozenset({"5.10"})
_BY_READING: Final = "what mprotect makes executable, and interpreters, only a scan finds there, as `ready` says"

KNOWN_FAULTS: Final = (
    *(
        KnownFault(f"tests.kernel.bpf.test_programs::test_{name}", _OLD, _BY_READING)
        for name in (
            "a_file_made_executable_later_is_told_and_made_harmless_again_too[protect]",
            "a_file_made_executable_later_is_told_and_made_harmless_again_too[pkeyprotect]",
            "a_part_made_executable_is_told_with_just_that_part",
            "executable_anonymous_memory_made_so_by_mprotect_is_not_told",
            "images_are_told_at_exec_if_asked_for",
        )
    ),
    KnownFault(
        "tests.kernel.engine.test_identity::test_one_btrfs_file_in_two_subvolumes_is_two_files",
        _ALL,
        "btrfs as a module that comes after the programs were loaded: its types are unknown to them",
    ),
    KnownFault(
        "tests.kernel.engine.test_identity::test_a_path_of_4000_bytes_is_told_whole[d]",
        _OLD,
        "a path of more than 128 components is reported as partial there",
    ),
)
