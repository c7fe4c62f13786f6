# SPDX-License-Identifier: MIT
"""Prints what it is told to echo, until Ctrl-C."""

import echo_shared

from postage import messaging, microthreads


class EchoReceiveProcessor(messaging.MessageProcessor):
    @messaging.MessageHandler("command", "echo")
    def msg_echo(self, content):
        print(content["parameters"])


eqk = [(echo_shared.EchoExchange, [("echo-queue", "echo-rk")])]

scheduler = microthreads.MicroScheduler()
scheduler.add_microthread(EchoReceiveProcessor({}, eqk))
with scheduler.stop_on_signals():
    for _ in scheduler.main():
        pass
