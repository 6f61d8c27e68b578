"""What the tools of this directory ask of the machine: commands, and Debian's packages. Imports none of them.

apt runs with lists of its own, so that nothing of this machine's configuration or packages changes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

__all__ = ["TRIES", "UNREACHED", "OutsideError", "UnreachedError", "apt_options", "mirror", "run"]

KEYS: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
#: What each fetch of apt's is allowed: a mirror that does not answer must not hold up a run for minutes.
TRIES: Final = {"Acquire::Retries": "5", "Acquire::http::Timeout": "30"}
#: The exit code of a tool that could not reach where packages come from, as sysexits.h names it: EX_TEMPFAIL.
UNREACHED: Final = 75
#: How apt, mmdebstrap and pip say so.
_UNREACHED_WORDS: Final = re.compile(
    r"could not connect|unable to connect|could not resolve|temporary failure (?:in name )?resol|connection failed"
    r"|connection timed out|connection refused|network is unreachable|failed to establish a new connection"
    r"|read timed out|name or service not known",
    flags=re.IGNORECASE,
)
#: By system, the variable that names a mirror of it.
_MIRRORS: Final = {"debian": "SOWATCH_MATRIX_MIRROR", "ubuntu": "SOWATCH_MIRROR_NOBLE"}


class OutsideError(Exception):
    """A tool of the system is missing or failed; the message ends with the next step."""


class UnreachedError(OutsideError):
    """What it fetches from could not be reached: nothing is known of what was asked for."""


def run(
    command: Sequence[str | Path],
    *,
    next_step: str,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Runs a tool of the system, in ``directory``, and returns what it printed.

    Args:
        command: and its arguments.
        next_step: ends the message of an error.
        directory: where it runs; None: here.
        environment: variables beside those of this process.

    Raises:
        UnreachedError: it failed, and said that it could not reach where packages come from.
        OutsideError: it is missing or failed; its last words and ``next_step`` are in the message.
    """
    variables = {**os.environ, **environment} if environment else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, env=variables)
    except OSError as error:
        raise OutsideError(f"cannot run {command[0]}: {error.strerror}. {next_step}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        kind = UnreachedError if _UNREACHED_WORDS.search(done.stderr + done.stdout) else OutsideError
        raise kind(f"{command[0]} failed: {words[-1] if words else done.returncode}. {next_step}")
    return done.stdout


def apt_options(state: Path, sources: Sequence[str], *, machine: str = "") -> list[str]:
    """Options that make apt see these sources only, and keep what it knows of them in ``state``.

    Args:
        state: a directory; made if need be.
        sources: lines of a sources.list, with ``{keys}`` where Debian's keys are named.
        machine: Debian's name of the architecture; default: this one.
    """
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    listed = state / "sources.list"
    listed.write_text("".join(line.format(keys=f"[signed-by={KEYS}]") + "\n" for line in sources), encoding="utf-8")
    options: dict[str, object] = {
        "Dir::Etc::sourcelist": listed,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
        # Otherwise it warns that its own user cannot write to our directory.
        "APT::Sandbox::User": "root",
        **TRIES,
    }
    if machine:
        options["APT::Architecture"] = machine
        options["APT::Architectures::"] = machine
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def mirror(next_step: str, system: str = "debian") -> str:
    """The mirror that apt takes a system's packages from already: ``debian`` or ``ubuntu``.

    Raises:
        OutsideError: it takes nothing from one.
    """
    variable = _MIRRORS[system]
    chosen = os.environ.get(variable)
    if chosen:
        return chosen
    sites = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], next_step=next_step)
    for site in sites.split():
        if site.rstrip("/").endswith(f"/{system}"):
            return site
    name = system.capitalize()
    raise OutsideError(f"apt here takes nothing from a mirror of {name}. Set {variable} to the URI of one.")
