"""`sowatch debug health` and `ready`, as probes run them: exit code and one line for each reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sowatch.cli import main
from support.scripted_agent import CUT, answer, scripted_agent

STALLED = "the draining thread has not gone round for 12 s"


def text(said: str, status: int) -> list[bytes]:
    body = f"{said}\n".encode()
    return [b"HTTP/1.1 %d X\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % (status, len(body)), body]


def readiness(*problems: str) -> list[bytes]:
    return answer({"ready": not problems, "problems": list(problems), "rules": ["all"]}, 503 if problems else 200)


@pytest.mark.parametrize(
    ("action", "found", "code", "printed"),
    [
        ("health", text("ok", 200), 0, "ok\n"),
        ("health", text(STALLED, 503), 1, f"{STALLED}\n"),
        ("ready", readiness(), 0, "ok\n"),
        ("ready", readiness("the first scan is not over", "a\nb"), 1, "the first scan is not over\na\\nb\n"),
    ],
    ids=["watches", "stalled", "ready", "not-ready"],
)
def test_the_exit_code_is_that_of_the_answer_and_the_reasons_are_printed(
    action: str, found: list[bytes], code: int, printed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted_agent(tmp_path / "s", {"/healthz": [found], "/readyz": [found]}) as asked:
        assert main(["debug", action, "--socket", str(tmp_path / "s")]) == code
    assert capfd.readouterr().out == printed
    assert asked == [{"health": "/healthz", "ready": "/readyz"}[action]]


def test_as_json_it_is_one_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with scripted_agent(tmp_path / "s", {"/healthz": [text(STALLED, 503)]}):
        assert main(["debug", "health", "--json", "--socket", str(tmp_path / "s")]) == 1
    assert capfd.readouterr().out == f'{{"ok":false,"problems":["{STALLED}"]}}\n'


@pytest.mark.parametrize("action", ["health", "ready"])
@pytest.mark.parametrize(
    ("found", "said"),
    [
        (text("no", 404), "with status 404. Is it the socket of `sowatch serve`?"),
        ([CUT], "ended before its answer was complete"),
    ],
    ids=["another-server", "ends"],
)
def test_what_is_no_answer_of_an_agent_is_an_error(
    action: str, found: list[bytes], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted_agent(tmp_path / "s", {"/": [found]}):
        assert main(["debug", action, "--socket", str(tmp_path / "s")]) == 1
    assert said in capfd.readouterr().err
    assert main(["debug", action, "--socket", str(tmp_path / "nobody")]) == 1
    assert "no agent answers" in capfd.readouterr().err


def test_an_agent_that_is_ready_in_no_form_we_know_is_one_of_another_version(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted_agent(tmp_path / "s", {"/readyz": [answer([1])]}):
        assert main(["debug", "ready", "--socket", str(tmp_path / "s")]) == 1
    assert "it is of another version than this command" in capfd.readouterr().err
