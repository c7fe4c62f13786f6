# SPDX-License-Identifier: MIT
"""Calls a service, and tells its replies.

Arguments: the name, [[command, argument], ...] as JSON, and perhaps another routing key.
"""

import json
import sys

from meeting_point import NAME, say
from postage import messaging


class Exchange(messaging.Exchange):
    name = NAME


class Caller(messaging.GenericProducer):
    eks = [(Exchange, sys.argv[3] if len(sys.argv) > 3 else "key")]
    rpc_timeout = 10
    max_retry = 0


def main():
    caller = Caller(messaging.Fingerprint("caller", "application").as_dict())
    for command, argument in json.loads(sys.argv[2]):
        reply = getattr(caller, "rpc_" + command)(argument)
        say("reply", [type(reply).__name__, bool(reply), reply.body["content"]])
    say("ended")


if __name__ == "__main__":
    main()
