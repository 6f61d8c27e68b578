"""``sowatch fleet receive`` and ``schema``: the store of a fleet."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.model.errors import UsageError

__all__ = ["configure", "run"]

#: The token, where no file has it.
TOKEN_VARIABLE: Final = "SOWATCH_FLEET_TOKEN"  # noqa: S105  (its name)
PAGE_TOKEN_VARIABLE: Final = "SOWATCH_FLEET_PAGE_TOKEN"  # noqa: S105  (its name)
_NEEDED: Final = ("chdb", "google.protobuf", "opentelemetry.proto", "prometheus_client", "starlette", "uvicorn")


def configure(parser: Parser) -> None:
    """Add the options of receive."""
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="of receive: where agents send to. Default: 127.0.0.1:4318, this host only",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"of receive: has the token that agents must send. Or {TOKEN_VARIABLE}"
    )
    parser.add_argument(
        "--page-token-file",
        metavar="FILE",
        help=f"of receive: has the token for readers of the page. Default: the same. Or {PAGE_TOKEN_VARIABLE}",
    )
    parser.add_argument(
        "--no-token", action="store_true", help="of receive: take records from everybody who reaches the port"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="of receive: certificate, in PEM, to serve HTTPS")
    parser.add_argument("--tls-key", metavar="FILE", help="of receive: the certificate's key, in PEM")


def run(action: str, words: Sequence[str], args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:  # noqa: ARG001
    """Receive until the end is asked for, or print the schema; returns the exit code."""
    if words:
        raise UsageError(f"{action} takes no {words[0]!r}. See `sowatch fleet --help`.")
    if action == "schema":
        from sowatch.fleet.schema import schema_sql

        out.write(schema_sql())
        out.flush()
        return 0
    _check_installed()
    from sowatch.fleet.service import DEFAULT_LISTEN, DEFAULT_STORE, serve
    from sowatch.web.logs import set_up_logging

    token, page_token = _token(args.token_file, TOKEN_VARIABLE), _token(args.page_token_file, PAGE_TOKEN_VARIABLE)
    if token is not None and args.no_token:
        raise UsageError("--no-token contradicts the token that is given. Leave one of them out.")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together. Give both.")
    set_up_logging("info", "logfmt")
    return serve(
        args.store or DEFAULT_STORE,
        listen=args.listen or DEFAULT_LISTEN,
        token=token,
        page_token=page_token,
        is_open=args.no_token,
        tls=None if args.tls_cert is None else (args.tls_cert, args.tls_key),
    )


def _token(file: str | None, variable: str) -> str | None:
    if file is None:
        token = os.environ.get(variable)
        source = variable
    else:
        source = repr(file)
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UsageError(f"cannot read the token in {source}: {reason}. Give a file with one line.") from error
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise UsageError(f"the token in {source} is no word of printable ASCII. Make one: openssl rand -hex 32.")
    return token


def _check_installed() -> None:
    from importlib.util import find_spec

    for name in _NEEDED:
        try:
            is_there = find_spec(name) is not None
        except ImportError:
            is_there = False
        if not is_there:
            raise UsageError(
                f"{name} is not installed, and a receiver needs it. Install it: pip install 'sowatch[fleet]'."
            )
