# SPDX-License-Identifier: MIT
"""Prints messages and who sent them. Some are for one receiver, some for all."""

import echo_shared

from postage import messaging, microthreads


class EchoReceiveProcessor(messaging.MessageProcessor):
    def __init__(self, fingerprint):
        shared_queue = "echo-queue"
        private_queue = messaging.Queue(
            "echo-queue-{pid}{host}".format(**fingerprint), exclusive=True
        )
        eqk = [
            (
                echo_shared.EchoExchange,
                [(shared_queue, "echo-rk"), (private_queue, "echo-fanout-rk")],
            )
        ]
        super().__init__(fingerprint, eqk)

    @messaging.MessageHandler("command", "echo")
    def msg_echo(self, content):
        print(content["parameters"])

    @messaging.MessageHandlerFullBody("command", "echo")
    def msg_echo_fingerprint(self, body):
        print("Message fingerprint:", body["fingerprint"])


fingerprint = messaging.Fingerprint("echo_receive", "controller").as_dict()

scheduler = microthreads.MicroScheduler()
scheduler.add_microthread(EchoReceiveProcessor(fingerprint))
with scheduler.stop_on_signals():
    for _ in scheduler.main():
        pass
