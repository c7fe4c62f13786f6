# SPDX-License-Identifier: MIT
"""Calls the echo service, and prints its answer, or that there is none and why."""

import sys

import echo_shared

from postage import messaging


class EchoProducer(messaging.GenericProducer):
    eks = [(echo_shared.EchoExchange, "echo-rk")]


fingerprint = messaging.Fingerprint("echo_send", "application").as_dict()

with EchoProducer(fingerprint) as producer:
    reply = producer.rpc_echo("RPC test message", _timeout=2, _max_retry=1)

if reply:
    print(reply.value)
else:
    print("RPC failed")
    sys.exit(f"{reply.value}: {reply.message}")
