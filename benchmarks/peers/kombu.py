# SPDX-License-Identifier: MIT
"""kombu: the client below celery and nameko, on py-amqp.

It has no RPC of its own: service and client follow the example of its documentation, with a
correlation id for each call and an exclusive queue for the replies.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from kombu import Connection, Consumer, Producer, Queue

from benchmarks.envelope import envelope, numbers
from benchmarks.job import Job, check, one_by_one
from benchmarks.measuring import Sample, Stopwatch
from benchmarks.peers import protocol


def publish_singly(job: Job) -> Sample:
    """Publish with confirms."""
    return _publish(job, confirm_publish=True)


def publish_many(job: Job) -> Sample:
    """Publish without confirms: with them, each message waits for its own."""
    return _publish(job, confirm_publish=False)


def _publish(job: Job, confirm_publish: bool) -> Sample:
    options = {"confirm_publish": confirm_publish}
    with Connection(job.url, transport_options=options) as connection:
        producer = Producer(connection.channel(), serializer="json")
        watch = Stopwatch()
        watch.start()
        for number in numbers(job.count):
            producer.publish(envelope(number), routing_key=job.queue, delivery_mode=2)
        watch.stop()
    return watch.sample(job.count, "message")


def consume(job: Job) -> Sample:
    """Handle the messages of a queue that exists."""
    watch = Stopwatch()
    counted = 0

    def count(_body: Any, message: Any) -> None:
        nonlocal counted
        if not counted:
            watch.start()
        counted += 1
        message.ack()
        if counted == job.count:
            watch.stop()

    with Connection(job.url) as connection, _consumer(connection, job, count):
        protocol.ready()
        while counted < job.count:
            connection.drain_events()
    return watch.sample(job.count - 1, "message")


def serve(job: Job) -> None:
    """Answer calls, by a connection of their own as `kombu.mixins.ConsumerProducerMixin` does.

    Before it publishes, py-amqp handles what has arrived: on one connection, callbacks would nest.
    """

    def answer(body: Any, message: Any) -> None:
        producer.publish(
            envelope(body["content"]["parameters"]["no"] + 1),
            routing_key=message.properties["reply_to"],
            correlation_id=message.properties["correlation_id"],
            delivery_mode=1,
        )
        message.ack()

    with (
        Connection(job.url) as connection,
        connection.clone() as second,
        _consumer(connection, job, answer),
    ):
        producer = Producer(second.channel(), serializer="json")
        protocol.ready()
        while True:
            connection.drain_events()


def _consumer(connection: Any, job: Job, callback: Callable[[Any, Any], None]) -> Consumer:
    return Consumer(
        connection.channel(),
        [Queue(job.queue, no_declare=True)],
        callbacks=[callback],
        prefetch_count=job.prefetch or None,
    )


def call(job: Job) -> Sample:
    """Call, one after the other or as many at a time as the job says."""
    with Connection(job.url) as connection:
        client = _Client(connection, job)
        if job.in_flight == 1:
            return one_by_one(client.call, job.count)
        return client.call_ahead()


class _Client:
    def __init__(self, connection: Any, job: Job) -> None:
        self.connection = connection
        self.job = job
        self.replies: dict[str, Any] = {}
        channel = connection.channel()
        self.producer = Producer(channel, serializer="json")
        self.callback_queue = Queue(str(uuid.uuid4()), exclusive=True, auto_delete=True)
        consumer = Consumer(channel, [self.callback_queue], callbacks=[self.replied], no_ack=True)
        consumer.consume()

    def replied(self, body: Any, message: Any) -> None:
        self.replies[message.properties["correlation_id"]] = body

    def send(self, number: int) -> str:
        correlation_id = str(uuid.uuid4())
        self.producer.publish(
            envelope(number),
            routing_key=self.job.queue,
            reply_to=self.callback_queue.name,
            correlation_id=correlation_id,
            delivery_mode=1,
        )
        return correlation_id

    def result(self, correlation_id: str) -> int:
        while correlation_id not in self.replies:
            self.connection.drain_events()
        return int(self.replies.pop(correlation_id)["content"]["parameters"]["no"])

    def call(self, number: int) -> int:
        return self.result(self.send(number))

    def call_ahead(self) -> Sample:
        waiting: dict[int, str] = {}
        watch = Stopwatch()
        watch.start()
        for number in numbers(self.job.count):
            if len(waiting) == self.job.in_flight:
                self.finish(waiting)
            waiting[number] = self.send(number)
        while waiting:
            self.finish(waiting)
        watch.stop()
        return watch.sample(self.job.count, "call")

    def finish(self, waiting: dict[int, str]) -> None:
        number = next(iter(waiting))
        check(number, self.result(waiting.pop(number)))


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume, serve, call)
