# SPDX-License-Identifier: MIT
"""The tree of errors, and what they say."""

from __future__ import annotations

import builtins
import inspect
import pickle

import pytest

from postage import errors

CLASSES = [
    each
    for each in vars(errors).values()
    if inspect.isclass(each) and each.__module__ == errors.__name__
]

#: Arguments of the errors that take other ones than a text.
ARGUMENTS = {
    errors.ChannelClosedError: (404, "NOT_FOUND - no queue 'x'", "declare queue 'x'", "Start it"),
    errors.UnroutableError: ([("exchange", "key")], [("exchange", "other")]),
    errors.BatchError: (["1"], [("2", errors.NackedError("full"))], []),
    errors.DecodeError: ("it is no JSON", b"\xff"),
    errors.Retry: (30,),
}


def example_of(error_class: type[Exception]) -> Exception:
    for each in error_class.__mro__:
        if each in ARGUMENTS:
            return error_class(*ARGUMENTS[each])
    return error_class("what happened")


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_or_signal_has_one_of_two_roots(error_class: type[Exception]) -> None:
    """Every class is a PostageError or a Signal, and none is both."""
    roots = [root for root in (errors.PostageError, errors.Signal) if issubclass(error_class, root)]

    assert 1 == len(roots)


@pytest.mark.parametrize("error_class", CLASSES)
def test_the_module_names_every_class_in_its_tree(error_class: type[Exception]) -> None:
    """The module's docstring shows each class."""
    assert errors.__doc__ is not None

    assert error_class.__name__ in errors.__doc__


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_survives_pickling(error_class: type[Exception]) -> None:
    """An error can cross the border of a process with its text."""
    error = example_of(error_class)

    copy = pickle.loads(pickle.dumps(error))

    assert (type(error), str(error)) == (type(copy), str(copy))


@pytest.mark.parametrize("error_class", [errors.TimeoutError, errors.PublishTimeoutError])
def test_a_timeout_is_also_the_builtin_one(error_class: type[Exception]) -> None:
    """An ordinary `except TimeoutError` catches ours."""
    assert issubclass(error_class, builtins.TimeoutError)


@pytest.mark.parametrize(
    "error_class",
    [errors.ConfigurationError, errors.EncodingError, errors.DecodeError, errors.ExitScheduler],
)
def test_some_are_also_value_errors(error_class: type[Exception]) -> None:
    """What says that a value is wrong, and the signals of 1.2.1, are ValueErrors."""
    assert issubclass(error_class, ValueError)


def test_a_closed_channel_says_what_was_attempted_and_what_to_do() -> None:
    """ChannelClosedError composes attempt, answer and advice."""
    error = errors.ChannelClosedError(404, "NOT_FOUND", "bind queue 'x'", "Declare it first")

    assert "bind queue 'x': the broker answered 404 NOT_FOUND. Declare it first" == str(error)
    assert "the broker answered 404 NOT_FOUND" == str(errors.ChannelClosedError(404, "NOT_FOUND"))


def test_a_refused_message_is_an_error_of_publishing() -> None:
    """`except PublishError` catches it, and so does what looks for the code."""
    error = errors.PublishRefusedError(403, "ACCESS_REFUSED", "publish")

    assert isinstance(error, errors.PublishError)
    assert isinstance(error, errors.ChannelClosedError)
    assert (403, "publish: the broker answered 403 ACCESS_REFUSED") == (error.code, str(error))


def test_an_unroutable_message_lists_the_pairs_without_a_queue() -> None:
    """UnroutableError names the failed pairs, and counts those that were delivered."""
    failed = [("a", "k1"), ("b", "k2")]

    error = errors.UnroutableError(failed, [("c", "k3")])

    assert (
        "no queue is bound to exchange 'a' key 'k1', exchange 'b' key 'k2'; delivered to 1 other "
        "pair(s) of the same call. Start the component that binds it, or send with "
        "_mandatory=False" == str(error)
    )
    assert "delivered" not in str(errors.UnroutableError(failed))


def test_an_unroutable_message_to_the_default_exchange_names_the_missing_queue() -> None:
    """There, a key is the name of a queue, and nobody binds anything."""
    text = str(errors.UnroutableError([("", "q")]))
    assert text.startswith("there is no queue 'q'. Start the component that declares it, or")

    fact = errors.UnroutableError([("", "q"), ("", "r"), ("a", "k")]).fact
    assert "there is no queue 'q', 'r' and no queue is bound to exchange 'a' key 'k'" == fact


def test_an_advice_follows_one_full_stop() -> None:
    """Some words of RabbitMQ end with one, others do not."""
    error = errors.ChannelClosedError(405, "of the original declaration.", "declare", "Choose")

    assert "declare: the broker answered 405 of the original declaration. Choose" == str(error)


def test_a_batch_counts_the_fates_and_tells_the_first_failure() -> None:
    """BatchError gives numbers, and one error as an example."""
    nacked, lost = errors.NackedError("full"), errors.PublishUnknownError("no confirm")

    assert "1 message(s) confirmed, 1 failed, 1 unknown; the first: message 2: full" == str(
        errors.BatchError(["1"], [("2", nacked)], [("3", lost)])
    )
    assert "0 message(s) confirmed, 0 failed, 1 unknown; the first: message 3: no confirm" == str(
        errors.BatchError([], [], [("3", lost)])
    )


def test_a_decode_error_keeps_the_body_and_does_not_show_it() -> None:
    """DecodeError carries the body as an attribute, and its text is the reason alone."""
    error = errors.DecodeError("no JSON", b"secret")

    assert ("no JSON", b"secret") == (error.reason, error.data)
    assert "no JSON" == str(error)
