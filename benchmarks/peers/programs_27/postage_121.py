# SPDX-License-Identifier: MIT
"""Postage 1.2.1, the last version of the original, under Python 2.7.

Its prefetch count is 1, it has no confirms, and its calls wait for their reply. It speaks
`benchmarks.peers.protocol`, which it cannot import.
"""

from __future__ import print_function

import json
import sys
import time

import meeting_point  # of the tests: it leads 1.2.1 to POSTAGE_URL

from postage import messaging, microthreads

JOB = json.loads(sys.argv[2])
COUNT = JOB["count"]
WARM_UP = 50
FINGERPRINT = {
    "name": "bench",
    "type": "demo",
    "pid": "12345",
    "host": "host",
    "user": "user",
    "vhost": "/",
}


class Exchange(messaging.Exchange):
    name = "%s-exchange" % JOB["queue"]


class Producer(messaging.GenericProducer):
    eks = [(Exchange, JOB["queue"])]


class Processor(messaging.MessageProcessor):
    counted = 0
    started = None

    @messaging.MessageHandler("command", "echo")
    def msg_echo(self, _content):
        if not self.counted:
            self.started = now()
        self.counted += 1
        if self.counted == COUNT:
            tell(rate(self.started, COUNT - 1, "message"))
            self.consumer.stop_consuming()
            raise microthreads.ExitScheduler

    @messaging.RpcHandler("command", "next")
    def rpc_next(self, content, reply_func):
        reply_func({"no": content["parameters"]["no"] + 1})


def now():
    return time.time(), time.clock()  # the latter is the processor time


def rate(started, count, unit):
    ended = now()
    seconds, cpu_seconds = ended[0] - started[0], ended[1] - started[1]
    return [["%ss/s" % unit, count / seconds], ["CPU us/%s" % unit, cpu_seconds * 1e6 / count]]


def tell(pairs):
    # Before 3.7, the order of a dictionary is not that of its keys.
    figures = ", ".join("%s: %s" % (json.dumps(name), value) for name, value in pairs)
    say("sample {%s}" % figures)


def say(text):
    print("benchmarks: " + text)
    sys.stdout.flush()


def numbers(count):
    return range(100000, 100000 + count)


def publish_many():
    producer = Producer(FINGERPRINT)
    producer.channel.queue_bind(
        queue=JOB["queue"], exchange=Exchange.name, routing_key=JOB["queue"]
    )
    started = now()
    for number in numbers(COUNT):
        producer.message_echo({"no": number})
    tell(rate(started, COUNT, "message"))


def consume():
    # Passive: the queue exists, with arguments that 1.2.1 does not know.
    queue = {"name": JOB["queue"], "flags": {"passive": True}}
    processor = Processor(FINGERPRINT, [(Exchange, [(queue, JOB["queue"])])], None, None)
    scheduler = microthreads.MicroScheduler()
    scheduler.add_microthread(processor)
    say("ready")
    for _ in scheduler.main():
        pass


serve = consume


def call():
    producer = Producer(FINGERPRINT)
    milliseconds = []
    for number in numbers(WARM_UP + COUNT):
        started = time.time()
        reply = producer.rpc_next({"no": number})
        milliseconds.append((time.time() - started) * 1000)
        if reply.body["content"]["value"] != {"no": number + 1}:
            raise RuntimeError("the reply to %s is %r" % (number, reply.body))
    measured = sorted(milliseconds[WARM_UP:])
    tell([["p%d ms" % each, measured[len(measured) * each // 100]] for each in (50, 90, 99)])


if __name__ == "__main__":
    assert meeting_point.IS_121
    {"publish_many": publish_many, "consume": consume, "serve": serve, "call": call}[sys.argv[1]]()
