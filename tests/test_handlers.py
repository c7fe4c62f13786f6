# SPDX-License-Identifier: MIT
"""Decorators of handlers, and the tables that a class makes of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from postage.handlers import (
    Handler,
    MessageFilter,
    MessageHandler,
    MessageHandlerFullBody,
    MessageHandlerType,
    Registration,
    RpcHandler,
)
from postage.processor import MessageProcessor
from tests.programs import ROOT


class Base(metaclass=MessageHandlerType):
    """A class with one handler of each kind, which no test changes."""

    @MessageHandler("command", "run")
    def msg_run(self, content: Any) -> None:
        """Handle the content of a command."""

    @MessageHandlerFullBody("status", "online")
    def msg_online(self, body: Any) -> None:
        """Handle the whole body of a status."""

    @RpcHandler("command", "sum")
    def rpc_sum(self, content: Any, reply_func: Callable[[Any], None]) -> None:
        """Answer a call."""


def attributes(owner: type, *key: str | None) -> list[str]:
    """Return the names of the handlers of a class for one key."""
    table: dict[Any, tuple[Registration, ...]] = vars(owner)["_message_handlers"]
    return [registration.attribute for registration in table.get(key, ())]


def test_a_table_says_for_each_kind_who_handles_it_and_what_it_gets() -> None:
    """The key is category, type and name; the value names attribute and part of the body."""
    table = Base._message_handlers

    assert {
        ("message", "command", "run"): (Registration("msg_run", "content", False),),
        ("message", "status", "online"): (Registration("msg_online", None, False),),
        ("rpc", "command", "sum"): (Registration("rpc_sum", "content", False),),
    } == table


def test_a_decorator_returns_the_same_function_and_says_what_it_notes() -> None:
    """As in 1.2.1: `handler_data` is category, type, name and part of the body."""

    def function(content: Any) -> None:
        """Do nothing."""

    decorator = MessageHandler("command", "run")

    assert function is decorator(function)
    assert ("message", "command", "run", "content") == decorator.handler_data
    assert ("message", "a", None, None) == MessageHandlerFullBody("a").handler_data
    assert ("rpc", "command", "sum", "content") == RpcHandler("command", "sum").handler_data


def test_threaded_is_noted_for_the_one_handler_that_says_so() -> None:
    """`threaded=True` concerns the decorated function alone."""

    class Own(Base):
        @MessageHandler("command", "slow", threaded=True)
        def msg_slow(self, content: Any) -> None: ...

    table = Own._message_handlers

    assert (Registration("msg_slow", "content", True),) == table["message", "command", "slow"]
    assert (Registration("msg_run", "content", False),) == table["message", "command", "run"]


# ------------------------------------------------------------------ tables of classes


def test_siblings_do_not_share_their_handlers() -> None:
    """In 1.2.1 all processors of a process shared one table."""

    class First(Base):
        @MessageHandler("command", "first")
        def msg_first(self, content: Any) -> None: ...

    class Second(Base):
        @MessageHandler("command", "second")
        def msg_second(self, content: Any) -> None: ...

    assert ["msg_first"] == attributes(First, "message", "command", "first")
    assert [] == attributes(First, "message", "command", "second")
    assert [] == attributes(Second, "message", "command", "first")
    assert [] == attributes(Base, "message", "command", "first")


def test_importing_generic_application_gives_other_processors_nothing() -> None:
    """In 1.2.1 every processor then answered pings and joined groups."""
    program = (
        "from postage.processor import MessageProcessor\n"
        "class Own(MessageProcessor): pass\n"
        "before = dict(Own._message_handlers)\n"
        "from postage import generic_application\n"
        "class Later(MessageProcessor): pass\n"
        "assert before == Own._message_handlers == Later._message_handlers\n"
        "print(sorted(before))"
    )

    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    expected = [("message", "command", "quit"), ("message", "command", "restart")]
    assert f"{expected}\n" == output


def test_a_decorated_override_replaces_the_handler() -> None:
    """In 1.2.1 both ran."""

    class Own(Base):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None: ...

    assert ["msg_run"] == attributes(Own, "message", "command", "run")


def test_an_undecorated_override_replaces_the_handler() -> None:
    """In 1.2.1 only the base's function ran. The table names the attribute, which is looked up."""

    class Own(Base):
        def msg_run(self, content: Any) -> None: ...

    assert ["msg_run"] == attributes(Own, "message", "command", "run")


def test_an_override_decorated_otherwise_handles_only_what_its_own_decorator_says() -> None:
    """Redecorated, an attribute leaves what the base class said of it."""

    class Own(Base):
        @MessageHandler("command", "walk")
        def msg_run(self, content: Any) -> None: ...

    assert [] == attributes(Own, "message", "command", "run")
    assert ["msg_run"] == attributes(Own, "message", "command", "walk")
    assert ["msg_run"] == attributes(Base, "message", "command", "run")


def test_none_switches_a_handler_off_for_subclasses_too() -> None:
    """`msg_run = None` leaves nothing that handles it, until somebody decorates it again."""

    class Own(Base):
        msg_run = None  # type: ignore[assignment]

    class Sub(Own):
        pass

    class Again(Sub):
        @MessageHandler("command", "run")
        def msg_run(self, content: Any) -> None: ...

    assert [] == attributes(Own, "message", "command", "run")
    assert [] == attributes(Sub, "message", "command", "run")
    assert ["msg_run"] == attributes(Again, "message", "command", "run")


def test_a_plain_mixin_brings_its_handlers_along() -> None:
    """1.2.1 did not look at bases that were no processors."""

    class Mixin:
        @MessageHandler("command", "mixed")
        def msg_mixed(self, content: Any) -> None: ...

    class Own(Mixin, Base):
        pass

    assert ["msg_mixed"] == attributes(Own, "message", "command", "mixed")
    assert ["msg_run"] == attributes(Own, "message", "command", "run")
    assert [] == attributes(Base, "message", "command", "mixed")


def test_a_mixin_overrides_like_any_class_that_comes_first() -> None:
    """The method resolution order decides, as for every attribute."""

    class Mixin:
        def msg_run(self, content: Any) -> None: ...

        @MessageHandler("command", "dash")
        def msg_online(self, content: Any) -> None: ...

    class Own(Mixin, Base):  # type: ignore[misc]
        pass

    assert ["msg_run"] == attributes(Own, "message", "command", "run")
    assert [] == attributes(Own, "message", "status", "online")
    assert ["msg_online"] == attributes(Own, "message", "command", "dash")


def test_several_decorators_on_one_function_all_count() -> None:
    """In 1.2.1 only the outermost of them did."""

    class Own(Base):
        @MessageHandler("command", "go")
        @MessageHandler("command", "start")
        @MessageHandlerFullBody("status", "started")
        def msg_go(self, content: Any) -> None: ...

    table = Own._message_handlers

    assert (Registration("msg_go", "content", False),) == table["message", "command", "go"]
    assert (Registration("msg_go", "content", False),) == table["message", "command", "start"]
    assert (Registration("msg_go", None, False),) == table["message", "status", "started"]


def test_several_handlers_of_one_message_stand_in_the_order_of_their_definition() -> None:
    """1.2.1 called them in an order that Python 2 made up."""

    class Own(Base):
        @MessageHandler("command", "x")
        def zulu(self, content: Any) -> None: ...

        @MessageHandler("command", "x")
        def alpha(self, content: Any) -> None: ...

        @MessageHandler("command", "x")
        def mike(self, content: Any) -> None: ...

    assert ["zulu", "alpha", "mike"] == attributes(Own, "message", "command", "x")


def test_the_handlers_of_a_subclass_come_before_those_of_its_base() -> None:
    """So that a custom handler is not kept from running by an inherited one that raises."""

    class Own(Base):
        @MessageHandler("command", "run")
        def msg_run_too(self, content: Any) -> None: ...

    class Sub(Own):
        @MessageHandler("command", "run")
        def msg_run_as_well(self, content: Any) -> None: ...

    expected = ["msg_run_as_well", "msg_run_too", "msg_run"]
    assert expected == attributes(Sub, "message", "command", "run")


def test_a_custom_quit_handler_stands_before_the_built_in_one() -> None:
    """In 1.2.1 the built-in one came first, raised, and the custom one never ran."""

    class Own(MessageProcessor):
        @MessageHandler("command", "quit")
        def say_goodbye(self, content: Any) -> None: ...

    assert ["say_goodbye", "msg_quit"] == attributes(Own, "message", "command", "quit")


def test_the_name_none_is_a_key_of_its_own() -> None:
    """It is the entry that a processor falls back to."""

    class Own(Base):
        @MessageHandler("command")
        def msg_any(self, content: Any) -> None: ...

    assert ["msg_any"] == attributes(Own, "message", "command", None)
    assert ["msg_run"] == attributes(Own, "message", "command", "run")


# ------------------------------------------------------------------- classes as handlers


def test_a_decorated_class_is_a_handler() -> None:
    """It is noted by its name, as a method is."""

    class Own(Base):
        @MessageHandler("command", "class")
        class MsgClass(Handler):
            def call(self) -> None: ...

    assert ["MsgClass"] == attributes(Own, "message", "command", "class")


def test_an_undecorated_handler_class_may_be_nested() -> None:
    """In 1.2.1 it made the creation of the processor class fail with a TypeError."""

    class Own(Base):
        class Plain(Handler):
            """Common to the handlers below."""

        @MessageHandler("command", "class")
        class MsgClass(Plain):
            def call(self) -> None: ...

        class Derived(MsgClass):
            """Not decorated itself, so no handler."""

    assert ["MsgClass"] == attributes(Own, "message", "command", "class")
    assert {*Base._message_handlers, ("message", "command", "class")} == {*Own._message_handlers}


def test_a_handler_instance_has_what_it_was_made_with_when_it_is_called() -> None:
    """`call()` runs in the constructor and finds the processor, the data and the reply function."""

    class Own(Handler):
        def call(self) -> Any:
            return (self.processor, self.data, self.reply_func)

    assert ("processor", {"a": 1}, print) == Own("processor", {"a": 1}, print).result
    assert None is Own("processor", {}).reply_func
    assert None is Handler("processor", {}).result


# --------------------------------------------------------------------------- filters


def first(data: Any) -> Any:
    """Pass on."""
    return data


def second(data: Any, *args: Any, **kwds: Any) -> Any:
    """Pass on."""
    return data


def test_filters_stand_from_the_bottom_up() -> None:
    """The one nearest to the function comes first."""

    @MessageFilter(second, 1, b=2)
    @MessageFilter(first)
    def handler(content: Any) -> None: ...

    assert [(first, (), {}), (second, (1,), {"b": 2})] == handler.filters  # type: ignore[attr-defined]


@pytest.mark.parametrize("above", [True, False])
def test_a_filter_stands_above_or_below_the_decorator_of_the_handler(above: bool) -> None:
    """Its place relative to the handler's decorator means nothing."""

    def function(self: Any, content: Any) -> None: ...

    decorators: list[Any] = [MessageFilter(first), MessageHandler("command", "x")]
    for decorator in reversed(decorators) if above else decorators:
        function = decorator(function)

    assert [(first, (), {})] == function.filters  # type: ignore[attr-defined]
    assert ["msg_x"] == attributes(
        MessageHandlerType("Own", (), {"msg_x": function}), "message", "command", "x"
    )


def test_a_filter_of_a_subclass_is_not_shared_with_its_parent_class() -> None:
    """In 1.2.1 the list was inherited, and the parent's handler was filtered, too."""

    @MessageFilter(first)
    class Parent(Handler):
        """One filter."""

    @MessageFilter(second)
    class Child(Parent):
        """Another one, after the inherited one."""

    assert [(first, (), {})] == Parent.filters  # type: ignore[attr-defined]
    assert [(first, (), {}), (second, (), {})] == Child.filters  # type: ignore[attr-defined]
