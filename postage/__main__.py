# SPDX-License-Identifier: MIT
"""``python -m postage`` is the command ``postage``."""

from __future__ import annotations

import sys

from postage.cli import main

if __name__ == "__main__":
    sys.exit(main())
