# SPDX-License-Identifier: MIT
"""The page about delivery guarantees names tests that exist, and errors that exist."""

from __future__ import annotations

import ast
import collections
import re
from pathlib import Path

import pytest

from postage import errors
from tests.programs import ROOT

PAGE = (ROOT / "docs" / "topics" / "delivery-guarantees.md").read_text(encoding="utf-8")


def named(pattern: str) -> list[str]:
    """Return what the page names in backticks, each once."""
    return sorted(set(re.findall(rf"`({pattern})`", PAGE)))


def names_of_tests(file: Path) -> list[str]:
    """Return the names of the tests of a file."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    return [
        node.name
        for node in module.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
    ]


TESTS = collections.Counter(
    name for file in (ROOT / "tests").rglob("test_*.py") for name in names_of_tests(file)
)


@pytest.mark.parametrize("name", named(r"test_\w+"))
def test_a_test_that_the_page_names_exists(name: str) -> None:
    """Who looks for the evidence of a row finds it, in one place."""
    assert 1 == TESTS[name]


@pytest.mark.parametrize("name", named(r"\w+Error"))
def test_an_error_that_the_page_names_exists(name: str) -> None:
    """What the caller is told is an error of postage."""
    assert issubclass(getattr(errors, name), errors.PostageError)


@pytest.mark.parametrize(
    "heading",
    re.findall(r"^## (When .+|Calls|Order)$", PAGE, re.MULTILINE),
)
def test_each_part_of_the_page_names_a_test(heading: str) -> None:
    """No part is without evidence."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    assert re.search(r"`test_\w+`", part) is not None
