# SPDX-License-Identifier: MIT
"""celery: a task queue on kombu.

It declares its queues, and gets messages of its own kind only, which are JSON with the envelope in
it. A worker runs the tasks in its own process (``--pool solo``), which is the fastest way for tasks
that are short, and acknowledges them when they are done. Results come back by ``rpc://``.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, signals
from celery.worker import state
from kombu import Exchange, Queue

from benchmarks.envelope import envelope, numbers
from benchmarks.job import Job, check, one_by_one
from benchmarks.measuring import Sample, Stopwatch
from benchmarks.peers import protocol


def publish_singly(job: Job) -> Sample:
    """Send with confirms."""
    return _publish(job, confirm_publish=True)


def publish_many(job: Job) -> Sample:
    """Send without confirms: with them, each message waits for its own."""
    return _publish(job, confirm_publish=False)


def _publish(job: Job, confirm_publish: bool) -> Sample:
    app = _app(job, broker_transport_options={"confirm_publish": confirm_publish})
    count = app.signature("count", ignore_result=True)
    count.delay(envelope(0))  # it connects with the first message
    watch = Stopwatch()
    watch.start()
    for number in numbers(job.count - 1):
        count.delay(envelope(number))
    watch.stop()
    return watch.sample(job.count - 1, "message")


def consume(job: Job) -> None:
    """Handle the messages of a queue."""
    app = _app(job)
    watch = Stopwatch()
    counted = 0

    @app.task(name="count", ignore_result=True)
    def count(_message: Any) -> None:
        nonlocal counted
        if not counted:
            watch.start()
        counted += 1
        if counted == job.count:
            watch.stop()
            protocol.tell(watch.sample(job.count - 1, "message"))
            state.should_stop = 0  # it acknowledges what it has done, and ends with this code

    _work(app)


def serve(job: Job) -> None:
    """Answer calls."""
    app = _app(job)

    @app.task(name="next")
    def following(message: Any) -> Any:
        return envelope(message["content"]["parameters"]["no"] + 1)

    _work(app)


def _work(app: Celery) -> None:
    signals.worker_ready.connect(lambda **_arguments: protocol.ready(), weak=False)
    name = app.conf.task_default_queue  # a worker keeps a queue under its name
    app.worker_main(["worker", "--pool", "solo", "--loglevel", "error", "--hostname", name])


def call(job: Job) -> Sample:
    """Call one by one, or ahead."""
    app = _app(job)
    following = app.signature("next")

    def number_of(result: Any) -> int:
        return int(result.get(interval=0.001)["content"]["parameters"]["no"])

    if job.in_flight == 1:
        return one_by_one(lambda number: number_of(following.delay(envelope(number))), job.count)
    number_of(following.delay(envelope(0)))
    waiting: dict[int, Any] = {}
    watch = Stopwatch()
    watch.start()
    for number in numbers(job.count):
        if len(waiting) == job.in_flight:
            first = next(iter(waiting))
            check(first, number_of(waiting.pop(first)))
        waiting[number] = following.delay(envelope(number))
    for each, result in waiting.items():
        check(each, number_of(result))
    watch.stop()
    return watch.sample(job.count, "call")


def _app(job: Job, **settings: Any) -> Celery:
    app = Celery(broker=job.url, backend="rpc://", set_as_current=True)
    queue = Queue(job.queue, Exchange(f"{job.queue}-exchange"), routing_key=job.queue)
    app.conf.update(
        task_queues=[queue],
        task_default_queue=job.queue,
        task_acks_late=True,
        worker_redirect_stdouts=False,
        worker_concurrency=1,  # prefetch counts are multiplied by it
        **settings,
    )
    if job.prefetch:
        app.conf.worker_prefetch_multiplier = job.prefetch  # for each of its processes: one
    return app


if __name__ == "__main__":
    protocol.main(publish_singly, publish_many, consume, serve, call)
