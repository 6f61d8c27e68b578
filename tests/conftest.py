"""What every test may rely on: markers by directory, deadlines, real processes, compiled programs, no leaks.

Environment: SOWATCH_DEADLINE_SCALE multiplies every deadline (slow guests);
SOWATCH_FORCE_KERNEL_TESTS=1 makes a skipped kernel or e2e test a failure where the kernel offers BPF;
SOWATCH_TEST_WHEEL names the wheel that must be what is tested (support.installed); SOWATCH_TEST_PROGRAMS a directory
for compiled test programs (support.programs).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

from support import bpfsys, installed, leaks, strict
from support.programs import build, compile_library

T = TypeVar("T")

pytest_plugins = ["support.http_table"]
TESTS = Path(__file__).resolve().parent
KINDS = ("unit", "kernel", "e2e")
FORCE = "SOWATCH_FORCE_KERNEL_TESTS"
FORCED = os.environ.get(FORCE, "") not in ("", "0")
SCALE = float(os.environ.get("SOWATCH_DEADLINE_SCALE") or 1)

# How long an example takes says nothing on a shared machine, and examples are kept in no database:
# the seed that a failure prints repeats it.
hypothesis.settings.register_profile("sowatch", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("sowatch")


# -- markers and the force switch ------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`, which not every run needs")


def pytest_configure(config: pytest.Config) -> None:
    leaks.note_starters()
    fault = installed.difference(Path(installed.WHEEL)) if installed.WHEEL else None
    if fault is not None:
        raise pytest.UsageError(f"the wheel is not what would be tested: {fault}")
    # A slow guest also needs longer until a test counts as stuck.
    if SCALE > 1 and config.getoption("timeout", None) is None:
        config.option.timeout = float(config.getini("timeout")) * SCALE


def pytest_report_header() -> list[str]:
    error = bpfsys.why_no_bpf()
    offer = "available" if error is None else f"not available: {error.strerror}"
    wheel = [f"installed from {Path(installed.WHEEL).name}, each file compared"] if installed.WHEEL else []
    return [
        *wheel,
        f"bpf(2): {offer}; skipped kernel tests {'fail' if FORCED else 'are allowed'}; deadlines x{SCALE:g}",
    ]


def pytest_itemcollected(item: pytest.Item) -> None:
    kind = _kind_of(item.path)
    if kind:
        item.add_marker(kind)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `full`, unless ``--full`` or the name of a test asks for it."""
    if config.getoption("full") or any("::" in word for word in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def _kind_of(path: Path) -> str | None:
    try:
        first = path.relative_to(TESTS).parts[0]
    except ValueError:
        return None
    return first if first in KINDS else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    tool = installed.missing_tool(call.excinfo.value if call.excinfo else None)
    if tool is not None:
        # Decided by what happened, so that nothing is skipped that would run.
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"there is no {tool} here, where a wheel is tested")
    # A test that was expected to fail and did is also called skipped; that one is in order.
    if report.skipped and not hasattr(report, "wasxfail") and _kind_of(item.path) in ("kernel", "e2e"):
        _fail_if_forced(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if report.skipped and _kind_of(collector.path) in ("kernel", "e2e"):
        _fail_if_forced(report)
    return report


def _fail_if_forced(report: pytest.TestReport | pytest.CollectReport) -> None:
    if FORCED and bpfsys.kernel_offers_bpf():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = (
            f"{reason}\nThis kernel offers BPF and SOWATCH_FORCE_KERNEL_TESTS is set: no kernel test may skip."
        )


@pytest.fixture
def needs_bpf() -> None:
    """Skips the test, but only if creating a BPF map really fails. Kernel tests all have it."""
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")


# -- nothing is left behind ------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _rested(request: pytest.FixtureRequest) -> None:
    """What ran before in this process may have been unit tests, which `_clean` does not look after."""
    if _kind_of(request.path) in ("kernel", "e2e"):
        leaks.rest(2 * SCALE)


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a kernel or e2e test that leaves an fd, thread, child, BPF object or pin behind.

    Asked for before any other fixture of the test, so it looks again after all of them ended.
    """
    kind = _kind_of(request.node.path)
    if kind not in ("kernel", "e2e"):
        yield
        return
    if kind == "kernel":
        request.getfixturevalue("needs_bpf")
    before = leaks.take_steady()
    yield
    left = leaks.settle(before, 10 * SCALE)
    if left:
        pytest.fail("the test left something behind:\n  " + "\n  ".join(left), pytrace=False)


# -- deadlines -------------------------------------------------------------------------------


class Deadline:
    """Bounds for waiting, stretched by SOWATCH_DEADLINE_SCALE.

    ``deadline(5)`` is a timeout for calls that take one; `wait_until` waits for a condition.
    """

    scale = SCALE

    def __call__(self, timeout_s: float) -> float:
        return timeout_s * self.scale

    def wait_until(self, predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
        """The first truthy value of ``predicate``.

        Args:
            predicate: called again and again, at least once.
            timeout_s: unscaled; the test fails after it.
            what: said in the failure: "what" did not happen.
        """
        end = time.monotonic() + self(timeout_s)
        while True:
            value = predicate()
            if value:
                return value
            if time.monotonic() >= end:
                pytest.fail(f"{what or predicate!r} did not happen within {self(timeout_s):g} s; last value: {value!r}")
            time.sleep(0.005)


@pytest.fixture(scope="session")
def deadline() -> Deadline:
    return Deadline()


@pytest.fixture(scope="session")
def wait_until(deadline: Deadline) -> Callable[..., Any]:
    """``wait_until(predicate, timeout_s=10.0, what="")``: see `Deadline.wait_until`."""
    return deadline.wait_until


# -- real processes --------------------------------------------------------------------------


class Spawner:
    """Starts processes as ``subprocess.Popen`` does; `close` ends and reaps those still running."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._started: list[subprocess.Popen[Any]] = []

    def __call__(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Like ``Popen(argv, **options)``, in a session of its own so that its children can be ended too."""
        options.setdefault("start_new_session", True)
        process = subprocess.Popen([os.fspath(word) for word in argv], **options)
        self._started.append(process)
        return process

    def end(self, process: subprocess.Popen[Any]) -> int:
        """Asks the process to end, insists if it does not, and reaps it. Returns its status."""
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                # It may have ended before it read everything.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if process.poll() is None:
            self._signal(process, signal.SIGTERM)
            # Stopped processes only hear of SIGTERM once they go on.
            self._signal(process, signal.SIGCONT)
            try:
                process.wait(self._deadline(5))
            except subprocess.TimeoutExpired:
                self._signal(process, signal.SIGKILL)
        return process.wait(self._deadline(10))

    def _signal(self, process: subprocess.Popen[Any], number: signal.Signals) -> None:
        try:
            # Not reaped yet, so the pid is still its own.
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid, number)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        for process in reversed(self._started):
            self.end(process)
        self._started.clear()


@pytest.fixture
def spawn(deadline: Deadline) -> Iterator[Spawner]:
    """``spawn([program, argument, ...], **popen_options)`` gives a Popen that the fixture ends and reaps."""
    spawner = Spawner(deadline)
    yield spawner
    spawner.close()


@pytest.fixture(scope="module")
def module_spawn(deadline: Deadline) -> Iterator[Spawner]:
    """The same for what every test of a module uses."""
    spawner = Spawner(deadline)
    yield spawner
    spawner.close()


# -- compiled programs and libraries ---------------------------------------------------------


class Programs:
    """tests/programs by name, each compiled once for the session when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __getitem__(self, name: str) -> Path:
        return build(name, self.directory)

    def variant(self, name: str, *flags: str) -> Path:
        """The same program compiled with more flags; once for each set of them."""
        return build(name, self.directory, flags=flags)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """``programs["mapper"]`` is the path of tests/programs/mapper.c, compiled; see support.programs.Mapper."""
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def make_library(tmp_path: Path) -> Callable[..., Path]:
    """``make_library(name, exports=())`` compiles a tiny shared library in the test's tmp_path.

    ``name`` may have directories in it; its last part is also the soname. Each export is a function
    ``int NAME(void)`` that returns its place in ``exports``. The build id differs with soname and exports.
    """
    return lambda name="libtiny.so", exports=(): compile_library(tmp_path / name, exports)


# -- the event schema ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def schema() -> Callable[[Any], Any]:
    """``schema(event)`` checks an Event, its dict or its JSON line against the schema the package ships.

    An event is also read back by `sowatch.decode`. Returns the dict, so that a test can check and use an event in one
    go; names that are not UTF-8 are in it as surrogate escapes.
    """
    import jsonschema

    from sowatch.model.encoding import exact, restore
    from sowatch.model.lines import decode, to_dict, to_json
    from sowatch.model.literals import EVENT_KINDS

    text = resources.files("sowatch.model").joinpath("event.schema.json").read_text(encoding="utf-8")
    whole = json.loads(text)

    @functools.cache
    def validator_of(kind: Any) -> jsonschema.Draft202012Validator:
        """Without the conditions for events of other kinds, which do not apply: they take most of the time."""
        conditions = [one for one in whole["allOf"] if one["if"]["properties"]["event"]["const"] == kind]
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        return jsonschema.Draft202012Validator({**whole, "allOf": conditions}, format_checker=checker)

    passed: set[str] = set()
    read_back = {*EVENT_KINDS, "ready", "lost", "repaired", "stopped"}

    def form(value: Any) -> Any:
        """What kind of value it is: digits of a time and of hexadecimal numbers all look alike."""
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return value >= 0
        return re.sub(r"[0-9a-f]+", "0", json.dumps(value))

    def check(event: Any) -> Any:
        if isinstance(event, str | bytes):
            found = strict.loads_wire(event)
        elif isinstance(event, Mapping):
            found = exact(event)
        else:
            found = strict.loads_wire(to_json(event, 0))
        # In a storm thousands of events differ in these only, each still checked for its form.
        alike = ("seq", "time", "t_ns", "ranges", "process", "library")
        shape = json.dumps({**found, **{key: form(found[key]) for key in alike if key in found}})
        if shape in passed:
            return restore(found)
        faults = sorted(validator_of(found.get("event")).iter_errors(found), key=str)
        if faults:
            listed = "\n".join(f"  {fault.json_path}: {fault.message}" for fault in faults)
            pytest.fail(f"not an event of schema 1:\n{json.dumps(found, indent=1)}\n{listed}")
        if found["event"] in read_back:
            assert to_dict(decode(json.dumps(found)), found["seq"]) == found
        passed.add(shape)
        return restore(found)

    return check
