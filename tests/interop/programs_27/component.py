# SPDX-License-Identifier: MIT
"""A component that tells what it gets. Arguments: the name, and perhaps the queue as JSON.

It runs on Postage 1.2.1 and on ours, by the same text.
"""

import json
import os
import sys

from meeting_point import NAME, WHO, say
from postage import messaging, microthreads

QUEUE = json.loads(sys.argv[2]) if len(sys.argv) > 2 else NAME


class Exchange(messaging.Exchange):
    name = NAME


class Component(messaging.MessageProcessor):
    @messaging.MessageHandlerFullBody("command", "echo")
    def msg_echo(self, body):
        say("echo", body)

    @messaging.MessageHandler("command", "content")
    def msg_content(self, content):
        say("content", content)

    @messaging.MessageHandlerFullBody("none", "none")
    def msg_generic(self, body):
        say("generic", body)

    @messaging.MessageHandlerFullBody("status", "online")
    def msg_online(self, body):
        say("online", body)

    @messaging.RpcHandler("command", "double")
    def rpc_double(self, content, reply_func):
        reply_func(messaging.MessageResult(content["parameters"] * 2, "doubled"))

    @messaging.RpcHandler("command", "mirror")
    def rpc_mirror(self, content, reply_func):
        reply_func(content["parameters"])

    @messaging.RpcHandler("command", "whoami")
    def rpc_whoami(self, content, reply_func):
        reply_func(messaging.MessageResult(WHO))

    @messaging.RpcHandler("command", "refuse")
    def rpc_refuse(self, content, reply_func):
        reply_func(messaging.MessageResultError("bad"))

    @messaging.RpcHandler("command", "report")
    def rpc_report(self, content, reply_func):
        reply_func(messaging.MessageResultException("Mishap", "told by hand"))

    @messaging.RpcHandler("command", "fail")
    def rpc_fail(self, content, reply_func):
        raise ValueError("boom")

    def _msg_consumer(self, channel, method, header, body):
        """Tell what pika 0.9.13 makes of the properties. Only 1.2.1 calls this."""
        say("properties", vars(header))
        super(Component, self)._msg_consumer(channel, method, header, body)


def main():
    fingerprint = messaging.Fingerprint("component", "controller").as_dict()
    component = Component(fingerprint, [(Exchange, [(QUEUE, "key")])], None, None)
    scheduler = microthreads.MicroScheduler()
    scheduler.add_microthread(component)
    say("ready", os.getpid())
    for _ in scheduler.main():
        pass
    say("ended")


if __name__ == "__main__":
    main()
