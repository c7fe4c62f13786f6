# SPDX-License-Identifier: MIT
"""Addressable components on RabbitMQ.

`postage.messaging`, `postage.microthreads` and `postage.generic_application` hold the
public names. They are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "2.0.0.dev0"
__all__ = ["__version__", "generic_application", "messaging", "microthreads"]


def __getattr__(name: str) -> Any:
    if name in ("messaging", "microthreads", "generic_application"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
