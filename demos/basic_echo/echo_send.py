# SPDX-License-Identifier: MIT
"""Sends one message, and returns when the broker has it."""

import echo_shared

from postage import messaging


class EchoProducer(messaging.GenericProducer):
    eks = [(echo_shared.EchoExchange, "echo-rk")]


with EchoProducer() as producer:
    producer.message_echo("A test message")
