# SPDX-License-Identifier: MIT
"""The seven classes of messages, replies, parameters and message ids."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postage.encoders import JsonEncoder
from postage.messages import (
    Message,
    MessageCommand,
    MessageResult,
    MessageResultError,
    MessageResultException,
    MessageStatus,
    RpcCommand,
    command_parameters,
    message_from_reply,
    new_message_id,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def body_of(type: str, name: str, category: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": type,
        "name": name,
        "category": category,
        "version": "2",
        "fingerprint": {},
        "content": content,
        "_reserved": {},
    }


def result_content(type: str, value: Any, message: Any) -> dict[str, Any]:
    return {"type": type, "value": value, "message": message}


#: Message, type, name, category, truth value, content.
MESSAGES = [
    (Message(), "none", "none", "message", True, {}),
    (Message(1, "a", k=2), "none", "none", "message", True, {"args": (1, "a"), "kwds": {"k": 2}}),
    (Message(self=1), "none", "none", "message", True, {"kwds": {"self": 1}}),
    (MessageCommand("echo"), "command", "echo", "message", True, {"parameters": {}}),
    (MessageCommand("echo", None), "command", "echo", "message", True, {"parameters": None}),
    (MessageCommand("größe", "T"), "command", "größe", "message", True, {"parameters": "T"}),
    (RpcCommand("sum", parameters=[5]), "command", "sum", "rpc", True, {"parameters": [5]}),
    (MessageStatus("online"), "status", "online", "message", True, {}),
    (MessageStatus(404), "status", "404", "message", True, {}),
    (MessageResult(3), "result", "none", "message", True, result_content("success", 3, "")),
    (
        MessageResult(value=3, message="fine"),
        *("result", "none", "message", True, result_content("success", 3, "fine")),
    ),
    (
        MessageResultError("bad"),
        *("result", "none", "message", False, result_content("error", None, "bad")),
    ),
    (
        MessageResultException(name="ValueError", message="boom"),
        *("result", "none", "message", False, result_content("exception", "ValueError", "boom")),
    ),
]


@pytest.mark.parametrize(("message", "type", "name", "category", "truth", "content"), MESSAGES)
def test_a_message_has_a_body_of_seven_keys(
    message: Message, type: str, name: str, category: str, truth: bool, content: dict[str, Any]
) -> None:
    """Body, class attributes and truth value are those of the wire format, in its order."""
    expected = body_of(type, name, category, content)

    assert list(expected.items()) == list(message.body.items())
    assert (type, category, truth) == (message.type, message.category, bool(message))
    assert {"body"} == set(vars(message))


@pytest.mark.parametrize("attribute", ["type", "name", "category"])
def test_a_subclass_may_set_what_it_is(attribute: str) -> None:
    """The class attributes of a subclass reach the body."""
    special = type("Special", (Message,), {attribute: "special"})

    assert "special" == special(1).body[attribute]


@pytest.mark.parametrize("command", [MessageCommand, RpcCommand])
def test_commands_without_parameters_share_nothing(command: type[MessageCommand]) -> None:
    """Changing the parameters of one message leaves the next one alone."""
    command("first").body["content"]["parameters"]["x"] = 1

    assert {"parameters": {}} == command("second").body["content"]


def test_a_fingerprint_is_added_from_keywords_and_from_a_dict() -> None:
    """fingerprint() merges what it gets, in either form."""
    message = Message()

    message.fingerprint(name="old", self="odd")
    message.fingerprint({"name": "new", "pid": "1"})
    message.fingerprint({"type": "x"}, pid="2")

    assert {"name": "new", "self": "odd", "pid": "2", "type": "x"} == message.body["fingerprint"]


def test_messages_with_equal_bodies_are_equal() -> None:
    """Equality looks at the body, whatever the class; other things are unequal."""
    one, same = MessageCommand("a", {"x": [1]}), MessageCommand("a", {"x": [1]})

    assert one == same
    assert hash(one) == hash(same)
    assert one != RpcCommand("a", {"x": [1]})
    assert one != MessageCommand("a", {"x": [2]})
    assert one != one.body


def test_messages_have_a_text_form_for_people() -> None:
    """str() is the body; repr() is the class, the name and a little of the content."""
    message = MessageCommand("echo", "T" * 1000)

    assert str(message.body) == str(message)
    assert "<MessageCommand echo {'parameters': 'TTTTTTTTTTTT...TTTTTTTTTTTTT'}>" == repr(message)


def test_error_and_exception_are_results() -> None:
    """A caller may ask for the class that all results share."""
    assert issubclass(MessageResultError, MessageResult)
    assert issubclass(MessageResultException, MessageResult)


def test_a_result_gives_its_value_and_its_message() -> None:
    """The two entries that callers want are attributes, too."""
    result, error = MessageResult([1], "fine"), MessageResultError("bad")

    assert ([1], "fine") == (result.value, result.message)
    assert (None, "bad") == (error.value, error.message)


@pytest.mark.parametrize(
    "result",
    [MessageResult({"a": [1]}, "m"), MessageResultError("bad"), MessageResultException("E", "m")],
)
def test_a_reply_becomes_the_result_that_was_sent(result: MessageResult) -> None:
    """The result that travelled and the one that is rebuilt are equal and of one class."""
    result.fingerprint(pid="1")

    reply = message_from_reply(JsonEncoder.decode(JsonEncoder.encode(result.body)))

    assert result == reply
    assert type(result) is type(reply)


def test_a_reply_may_come_from_a_1_2_1_program() -> None:
    """Replies of 1.2.1 carry an empty fingerprint, and an error may carry a value."""
    body = body_of("result", "none", "message", result_content("error", "dropped", "bad"))

    assert MessageResultError("bad") == message_from_reply(body)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"content": {"type": "success", "value": 1}}, "{'type': 'success', 'value': 1}"),
        ({"content": {"type": "error"}}, "{'type': 'error'}"),
        ({"content": {"type": "exception", "message": ""}}, "{'message': '', 'type': 'exception'}"),
        ({"content": {"type": "partial"}}, "{'type': 'partial'}"),
        ({"content": {"type": ["success"]}}, "{'type': ['success']}"),
        ({"content": {}}, "{}"),
        ({"content": None}, "None"),
        ({"content": "success"}, "'success'"),
        ({}, "{}"),
        (None, "None"),
        ([1], "[1]"),
        ("success", "'success'"),
    ],
)
def test_a_malformed_reply_becomes_an_error(body: Any, shown: str) -> None:
    """The result is false and shows what came."""
    assert MessageResultError(f"Malformed reply {shown}") == message_from_reply(body)


def test_a_malformed_reply_keeps_the_fingerprint() -> None:
    """Who sent nonsense is worth knowing."""
    reply = message_from_reply({"fingerprint": {"pid": "1"}, "content": 5})

    assert {"pid": "1"} == reply.body["fingerprint"]


@pytest.mark.parametrize("fingerprint", [None, [], "me", 1])
def test_a_fingerprint_that_is_no_dict_is_dropped(fingerprint: Any) -> None:
    """A rebuilt reply always has a dict there."""
    body = {**MessageResult(1).body, "fingerprint": fingerprint}

    assert MessageResult(1) == message_from_reply(body)


@given(json_values | st.fixed_dictionaries({"content": json_values, "fingerprint": json_values}))
def test_no_reply_raises(body: Any) -> None:
    """Whatever JSON a peer sends, a result comes out."""
    assert "result" == message_from_reply(body).body["type"]


@pytest.mark.parametrize(
    ("args", "kwds", "expected"),
    [
        ((), {}, {}),
        (("T",), {}, "T"),
        ((None,), {}, None),
        ((("a", "b"),), {}, ("a", "b")),
        ((1, "a"), {}, [1, "a"]),
        ((), {"a": 1}, {"a": 1}),
        ((), {"parameters": "T"}, "T"),
        ((), {"parameters": "T", "a": 1}, {"parameters": "T", "a": 1}),
        ((1,), {"a": 2}, {"args": [1], "kwds": {"a": 2}}),
        ((1,), {"parameters": 2}, {"args": [1], "kwds": {"parameters": 2}}),
    ],
)
def test_a_command_takes_as_many_parameters_as_you_want(
    args: tuple[Any, ...], kwds: dict[str, Any], expected: Any
) -> None:
    """One value stays what it is, as in 1.2.1; several become a list, keywords a dict."""
    assert expected == command_parameters(args, kwds)


def test_message_ids_differ() -> None:
    """Threads that ask for ids at the same time get different ones."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: new_message_id(), range(10_000)))

    assert len(ids) == len(set(ids))


def test_message_ids_of_one_process_share_a_beginning() -> None:
    """Only a number is counted up, which is cheap."""
    (prefix, number), (same, following) = (new_message_id().split("-") for _ in range(2))

    assert (prefix, int(number) + 1) == (same, int(following))


def test_a_forked_child_makes_ids_of_its_own() -> None:
    """A fork copies the counter, but not the beginning of the ids."""
    before = new_message_id().split("-")[0]
    with multiprocessing.get_context("fork").Pool(1) as child:
        of_child = child.apply(new_message_id).split("-")[0]
    after = new_message_id().split("-")[0]

    assert before == after
    assert before != of_child
