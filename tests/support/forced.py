"""What ``SOWATCH_TEST_OPTIONS`` forces on the tests of every strategy, as ``--strategy core --hooks syscall``.

`scripts/matrix` sets it for each cell of its table.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["FORCED", "OPTIONS"]

#: Words for a command line.
OPTIONS: Final = os.environ.get("SOWATCH_TEST_OPTIONS", "").split()
#: The same as fields of `sowatch.model.config.Config`.
FORCED: Final = {name.removeprefix("--"): value for name, value in zip(OPTIONS[::2], OPTIONS[1::2], strict=True)}
