"""`python -m sowatch` is the command `sowatch`."""

from __future__ import annotations

from sowatch.cli import main

raise SystemExit(main())
