"""``python -m dtr``: the same as the command ``dtr``."""

from __future__ import annotations

import sys

from dtr.cli import main

sys.exit(main())
