# SPDX-License-Identifier: MIT
"""Sends one message to one receiver, and one to all of them."""

import echo_shared

from postage import messaging


class EchoProducer(messaging.GenericProducer):
    eks = [(echo_shared.EchoExchange, "echo-rk")]


fingerprint = messaging.Fingerprint("echo_send", "application").as_dict()

with EchoProducer(fingerprint) as producer:
    producer.message_echo("A single test message")
    producer.message_echo("A fanout test message", _key="echo-fanout-rk")
