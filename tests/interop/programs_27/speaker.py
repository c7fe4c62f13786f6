# -*- coding: utf-8 -*-
# SPDX-License-Identifier: MIT
"""Says everything that a producer can say, once. Arguments: the name, and perhaps the speech.

It runs on Postage 1.2.1 and on ours, by the same text, and both must write the same bodies.
"""

from __future__ import unicode_literals

import collections
import sys

from meeting_point import NAME, say
from postage import messaging

Point = collections.namedtuple("Point", "x y")

FINGERPRINT = messaging.Fingerprint(
    "speaker", "application", pid=4242, host="box", user="root", vhost="/"
).as_dict()


class Exchange(messaging.Exchange):
    name = NAME


class Speaker(messaging.GenericProducer):
    eks = [(Exchange, "key")]
    rpc_timeout = 0.1
    max_retry = 0

    def build_message_online(self):
        return messaging.MessageStatus("online")

    def build_message_success(self):
        return messaging.MessageResult(3)

    def build_message_success_with_text(self):
        return messaging.MessageResult({"a": None}, "text")

    def build_message_error(self):
        return messaging.MessageResultError("bad")

    def build_message_exception(self):
        return messaging.MessageResultException("ValueError", "boom")

    def build_message_of_two(self, one, two):
        return messaging.MessageCommand("two", {"one": one, "two": two})

    def build_rpc_of_two(self, one, two):
        return messaging.RpcCommand("two", parameters={"one": one, "two": two})


def say_all(speaker):
    speaker.message()
    speaker.message(1, "a", k=2)
    speaker.message([], {}, (), None, True, False, 1.5, -0.0, 1e300, 2**70, key=(1, (2,)))
    speaker.message('Grüße, 世界 \U0001f600 \u2028 \x00 \x7f " \\ /', **{"k": "\xe9"})
    speaker.message(Point(1, 2), points=[Point(Point(1, 2), None)])
    speaker.message({1: "int", 2.5: "float", None: "none", "ü": {}})
    speaker.message("a lone surrogate: \ud800")
    speaker.message_echo()
    speaker.message_echo("T")
    speaker.message_echo(None)
    speaker.message_echo(0)
    speaker.message_echo([])
    speaker.message_echo({"a": 5, "b": [1, 2.0, "x"]})
    speaker.message_echo(parameters={"a": 5})
    speaker.message_echo("žluťoučký kůň")
    speaker.message_echo(Point("é", [Point(1, 2)]))
    speaker.message_echo("T", _key="key")
    speaker.message_with_a_long_name_1("T")
    speaker.message_online()
    speaker.message_success()
    speaker.message_success_with_text()
    speaker.message_error()
    speaker.message_exception()
    speaker.message_of_two(1, two="é")
    speaker.forward({"anything": [1, "é"], "fingerprint": {"name": "another"}})
    speaker.rpc_sum()
    speaker.rpc_sum({"a": 5})
    speaker.rpc_sum(Point(1, "é"))
    speaker.rpc_sum(parameters=[1, 2])
    speaker.rpc_sum("T", _timeout=0.1)
    speaker.rpc_sum("T", _queue_only=True)
    speaker.rpc_of_two(1, "é")
    speaker.message_said_all()


def say_hello(speaker):
    speaker.message_echo({"text": "žluťoučký kůň", "numbers": [1, 2.5, None, True]})
    speaker.message(1, "a", k=2)
    speaker.message_online()
    speaker.message_content("T")


def say_nan(speaker):
    speaker.message_content([float("nan"), float("inf")])


def say_unknown(speaker):
    speaker.message_unknown("é")


def say_quit(speaker):
    speaker.message_quit()


def say_restart(speaker):
    speaker.message_restart()


def main():
    speech = sys.argv[2] if len(sys.argv) > 2 else "all"
    speaker = Speaker(FINGERPRINT)
    globals()["say_" + speech](speaker)
    say("ended")


if __name__ == "__main__":
    main()
