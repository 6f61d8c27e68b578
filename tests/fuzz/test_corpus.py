"""Every input that is kept passes its target, without atheris: what was once found is found again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("fuzz_targets", HERE / "targets.py")
assert _SPEC is not None
assert _SPEC.loader is not None
targets = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(targets)

INPUTS = sorted(path for path in (HERE / "corpus").glob("*/*") if path.is_file())

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_that_is_kept_passes(path: Path) -> None:
    targets.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_inputs_and_all_of_them_are_small() -> None:
    assert {path.parent.name for path in INPUTS} == set(targets.TARGETS)
    assert sum(path.stat().st_size for path in INPUTS) < 200_000


def test_a_target_fails_on_a_reader_that_believes_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "executable_maps", targets.parse_maps)  # rows without x too
    with pytest.raises(AssertionError):
        targets.maps(b"1000-2000 r--p 00000000 fe:01 7    /lib/x.so\n")
