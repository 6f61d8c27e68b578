"""The agent: watches the host and answers over HTTP, until SIGTERM or SIGINT.

On the unix socket, for its owner: /inventory, /events (server-sent), /explain, /audit, /metrics,
/healthz, /readyz and /debug. On TCP, which is off unless asked for and on the loopback interface only:
what changes nothing, and the page at /. `sowatch debug` asks the socket.

Settings come from the file (TOML), then from the environment (SOWATCH_LISTEN, SOWATCH_WATCH_STRATEGY),
then from these options. Changes of the file take effect as they happen; SIGHUP reads it again, too.
docs/operations.md has every key, the metrics to alert on, and the privileges it needs.

Examples:
  sowatch serve                                    socket /run/sowatch/sowatch.sock
  sowatch serve --listen 127.0.0.1:9400            and the page, for Prometheus and a browser
  sowatch serve --config sowatch.toml --check      is this file right?
"""

# Heavy modules are imported only where they are used.

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from sowatch import __version__
from sowatch.cli._last_resort import LastResort
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.model.errors import UsageError


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--config", metavar="FILE", help="default: /etc/sowatch/config.toml, if it is there")
    parser.add_argument("--socket", metavar="PATH", help="of the unix socket. Default: /run/sowatch/sowatch.sock")
    parser.add_argument("--listen", metavar="HOST:PORT", help="of the loopback interface. Default: no TCP")
    parser.add_argument("--check", action="store_true", help="only say whether the settings are right")


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:  # noqa: ARG001 - it logs
    """Serve until the end is asked for; returns the exit code."""
    from sowatch.agent.settings import DEFAULT_PATH, Settings, load_settings

    flags: dict[str, Any] = {
        name: value for name, value in (("socket", args.socket), ("listen", args.listen)) if value is not None
    }

    def load() -> Settings:
        return load_settings(args.config, environment=os.environ, flags=flags)

    settings = load()
    try:
        from sowatch.agent.daemon import Daemon
        from sowatch.agent.preflight import check_settings
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed, and the agent needs it. Install it: pip install 'sowatch[agent]'."
        ) from error
    check_settings(settings)
    if args.check:
        out.write("the settings are right\n")
        out.flush()
        return 0
    # Not called off: what hangs may do so to the very end, in an exit handler of the interpreter.
    last = LastResort()
    return Daemon(settings, load, args.config or DEFAULT_PATH, version=__version__, on_stopping=last.arm).run()
