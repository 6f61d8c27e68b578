"""A file system may answer any question with any error: FUSE servers do, and an aborted connection to one."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.function_table import function_table
from sowatch.linux.proc import ProcFs
from sowatch.linux.symbols import SymbolError, open_checked, resolve
from sowatch.model.errors import SowatchError
from sowatch.model.events import Library
from sowatch.model.identity import FileId
from sowatch.uprobes.address_book import AddressBook
from sowatch.uprobes.attached import File
from sowatch.uprobes.known_files import open_known
from sowatch.uprobes.places import Returns, places_of
from sowatch.uprobes.probes import Probe


@pytest.fixture
def path(make_library: Callable[..., Path]) -> Path:
    return make_library("libtiny.so", exports=("first", "second"))


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    made = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    yield made
    os.close(made)


@contextmanager
def refused(name: str, after: int) -> Iterator[list[int]]:
    """Within, ``os.NAME`` works so often and then fails; gives how often it failed."""
    works: Any = getattr(os, name)
    left, failed = after, [0]

    def answer(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return works(*arguments)
        failed[0] += 1
        raise OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, answer)
        yield failed


def each_refusal(name: str, work: Callable[[], Any]) -> Iterator[Any]:
    """What the work gives, or the error of ours that it raises, when the first, second, ... question is refused."""
    for after in itertools.count():
        with refused(name, after) as failed:
            try:
                found: Any = work()
            except SowatchError as error:
                found = error
        if not failed[0]:
            assert after, f"it never calls os.{name}"
            return
        yield found


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_file_to_arm_is_refused_with_the_reason_and_nothing_stays_open(path: Path) -> None:
    before = open_files()
    for error in each_refusal("fstat", lambda: os.close(open_known(str(path), ProcFs()).fd)):
        assert os.strerror(errno.ECONNABORTED) in str(error)
        assert open_files() == before


def test_a_path_to_list_is_refused_and_nothing_stays_open(path: Path) -> None:
    before = open_files()
    for error in each_refusal("fstat", lambda: os.close(open_checked(str(path)))):
        assert isinstance(error, SowatchError)
        assert open_files() == before


@pytest.mark.parametrize("name", ["fstat", "pread"])
def test_functions_have_no_names(name: str, fd: int) -> None:
    assert set(each_refusal(name, lambda: function_table(fd))) == {None}


@pytest.mark.parametrize("name", ["fstat", "pread"])
@pytest.mark.parametrize("symbol", ["first", "f*"])
def test_a_function_is_not_found_with_the_reason(name: str, symbol: str, fd: int) -> None:
    for error in each_refusal(name, lambda: resolve(fd, symbol)):
        assert isinstance(error, SymbolError)
        assert error.reason == os.strerror(errno.ECONNABORTED)


@pytest.mark.parametrize("returns", ["probe", "instructions"])
def test_a_place_is_not_probed_with_the_reason(returns: Returns, fd: int) -> None:
    probe = Probe("first", "on_first", is_return=True)
    for found in each_refusal("pread", lambda: list(places_of(fd, probe, returns))):
        (error,) = found if isinstance(found, list) else [found]
        assert isinstance(error, SowatchError)
        assert os.strerror(errno.ECONNABORTED) in str(error)


def test_an_attached_file_stays_and_an_address_has_its_file_only(path: Path, fd: int) -> None:
    status = path.stat()
    library = Library(str(path), FileId(0, 0, status.st_ino), host_path=str(path))
    assert set(each_refusal("fstat", lambda: File(library, fd).is_deleted)) == {False}
    before = open_files()
    book = AddressBook()
    assert set(each_refusal("fstat", lambda: book._table(library))) == {None}
    assert open_files() == before
