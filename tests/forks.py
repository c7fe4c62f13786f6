# SPDX-License-Identifier: MIT
"""What the child of a fork has to say."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any


def in_child(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call a function in a forked child. What is returned waits for the child and its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            try:
                answer = function()
            except BaseException:
                answer = traceback.format_exc()
            with open(writer, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writer)

    def result() -> Any:
        with open(reader) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(text)

    return result


def name_of_error(call: Callable[[], Any]) -> str:
    """Call a function that should raise, and return the name of what it raised."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "no error"
