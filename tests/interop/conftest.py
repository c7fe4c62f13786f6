# SPDX-License-Identifier: MIT
"""Two versions of postage side by side: the last one of the original, and this one.

Postage 1.2.1 needs Python 2.7 and pika 0.9.13. ``POSTAGE_TEST_PYTHON27`` names the interpreter;
else one is looked for on the PATH and among those of pyenv. The two packages are installed into a
temporary folder. What is missing skips the tests, and the summary says so.
"""

from __future__ import annotations

import os

import pytest

from tests.interop import installation
from tests.interop.installation import Installation


@pytest.fixture(scope="session")
def ours() -> Installation:
    """Postage as it is in this checkout."""
    return installation.ours()


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Postage 1.2.1."""
    named = os.environ.get("POSTAGE_TEST_PYTHON27")
    python = installation.find_python27(named)
    if python is None:
        if named:
            pytest.fail(f"POSTAGE_TEST_PYTHON27 is {named!r}, which does not run Python 2.7")
        pytest.skip("no Python 2.7 runs here; POSTAGE_TEST_PYTHON27 may name one")
    try:
        return installation.original(python, tmp_path_factory.mktemp("postage-1.2.1"))
    except RuntimeError as error:
        pytest.skip(f"Postage 1.2.1 cannot be installed for {python}: {error}")
