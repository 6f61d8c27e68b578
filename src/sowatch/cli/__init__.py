"""The command `sowatch`: one file a command, whose docstring is its help.

watch, list, ...      the commands: `configure` adds options, `run` does it and returns the exit code
_main                 from the words of a command line to an exit code
_options              the options they share, and the seam to the watcher (`OpenWatcher`)
_parser               argparse with errors that are ours
_out, _stop           stdout that never hangs or breaks noisily; ending by signal and by the clock
_front, _child        the process that waits for the one that does the work; one that a command is started in
_feed                 a watch whose events are shown
_lines, _live, _table what people see: event lines, the terminal view, tables
_schema               the JSON Schema of the lines

What is heavy (the watcher with its binding, rich) is imported where it is used, so that ``sowatch --help`` answers at
once.
"""

from __future__ import annotations

# Nothing else may be done here: the command module `list` hides the built-in once it is imported.
try:
    from sowatch.cli._main import main
except KeyboardInterrupt:
    raise SystemExit(130) from None  # a traceback would say nothing: no work has begun

__all__ = ["main"]
