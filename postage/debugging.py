# SPDX-License-Identifier: MIT
"""What `POSTAGE_DEBUG_MODE=true` does: every message is shown on standard error."""

from __future__ import annotations

import logging

from postage.settings import debug_mode_from_environment

DEBUG = logging.DEBUG

_root = logging.getLogger("postage")
_handler = logging.StreamHandler()
_handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))


def logger_of(name: str) -> logging.Logger:
    """Return the logger of a module."""
    return logging.getLogger(name)


def attach_if_asked() -> None:
    """Show debug messages if the environment asks for it. May be called often."""
    if debug_mode_from_environment() and _handler not in _root.handlers:
        _root.addHandler(_handler)
        _root.setLevel(logging.DEBUG)
