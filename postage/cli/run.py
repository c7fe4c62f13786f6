# SPDX-License-Identifier: MIT
"""Run components until a signal or a message ends them.

A target is MODULE:NAME, found from the working directory on. NAME is a subclass of
GenericApplication, or something that is called without arguments and returns a component.
Several targets share one process. SIGTERM and SIGINT end all of them in order: handlers that
run may finish, messages that nobody has started go back. A second signal ends at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import re
import sys
from typing import Any

from postage.cli import CommandError

logger = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("targets", nargs="+", metavar="MODULE:NAME", help="what to run")
    parser.add_argument(
        "--name",
        help="the name of the application, for one target (default: that of its class, as in "
        "mail-clerk for MailClerk)",
    )
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="GROUP",
        dest="groups",
        help="a group to join; repeat for more",
    )
    parser.add_argument(
        "--log-level", choices=LEVELS, default="info", help="what to log (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the components.

    Raises:
        CommandError: A target cannot be found, or is none.
        PostageError: It cannot be started: there is no broker, for instance.
    """
    from postage.microthreads import MicroScheduler

    if options.name is not None and len(options.targets) > 1:
        raise CommandError("--name is for one target", exit_code=2)
    logging.getLogger().setLevel(options.log_level.upper())
    logging.getLogger("pika").setLevel("CRITICAL")  # what matters of it, postage says
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    targets = [_load(text) for text in options.targets]
    scheduler = MicroScheduler()
    components: list[Any] = []
    try:
        for target in targets:
            components.append(_make(target, options))
            scheduler.add_microthread(components[-1])
        with scheduler.stop_on_signals():
            for _ in scheduler.main():
                pass
    finally:
        for component in components:
            close = getattr(component, "close", None)
            if close is not None:
                close()
    return 0


def _load(text: str) -> Any:
    """Return what a target names."""
    from postage import restart

    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise CommandError(f"{text!r} is not of the form MODULE:NAME", exit_code=2)
    try:
        is_there = importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):  # the package that it should be in is not there
        is_there = False
    if not is_there:
        raise CommandError(f"there is no module {module_name!r} here or on the path", exit_code=2)
    module = importlib.import_module(module_name)
    if module.__file__ is not None:
        restart.sources.append(module.__file__)
    target: Any = module
    for part in name.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        raise CommandError(f"{module_name!r} has nothing to run that is called {name!r}", 2)
    return target


def _make(target: Any, options: argparse.Namespace) -> Any:
    """Return the component of a target, connected."""
    from postage.fingerprint import Fingerprint
    from postage.generic_application import GenericApplication

    if isinstance(target, type) and issubclass(target, GenericApplication):
        name = options.name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", target.__name__).lower()
        fingerprint = Fingerprint(name, "application").as_dict()
        component: Any = target(fingerprint, groups=options.groups)
        logger.info("%s %s@%s is at work", name, fingerprint["pid"], fingerprint["host"])
        return component
    if options.name is not None or options.groups:
        raise CommandError(f"--name and --group are for applications, not for {target!r}", 2)
    component = target()
    if not hasattr(component, "main"):
        raise CommandError(f"{target!r} made no component, but {component!r}", 2)
    logger.info("%r is at work", component)
    return component
