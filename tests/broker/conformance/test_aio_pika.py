# SPDX-License-Identifier: MIT
"""aio-pika judges the broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, TypeVar

import aio_pika
import pytest
from aio_pika import DeliveryMode, Message, exceptions
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aio_pika.patterns import RPC, Master

from tests.broker.conformance.samples import BODY_SIZES, FRAME_MAX, ROUTES, body_of, death_of
from tests.broker.conformance.servers import Server

T = TypeVar("T")

#: Seconds after which something that has to happen counts as missing.
DEADLINE_SECONDS = 30.0

#: A value of each type that aio-pika's codec writes into a field table: it takes the smallest
#: integer that does. The float has single precision.
FIELDS = {
    "S": "häßlich",
    "x": bytearray(b"\x00\xff"),
    "t": True,
    "t-false": False,
    "b": -128,
    "s": -(2**15),
    "u": 2**16 - 1,
    "I": -(2**31),
    "i": 2**32 - 1,
    "l": -(2**63),
    "l-most": 2**63 - 1,
    "f": 0.15625,
    "D": Decimal("-3.14159"),
    "T": datetime(2038, 1, 19, 3, 14, 8, tzinfo=timezone.utc),
    "F": {"deep": {"deeper": [{"deepest": None}]}, "none": {}},
    "A": [1, "two", [3, [4]], {"five": 5}, None, []],
    "V": None,
}


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run what an asynchronous test does, within a deadline."""

    async def timed() -> None:
        await asyncio.wait_for(test(), DEADLINE_SECONDS)

    asyncio.run(timed())


async def until(condition: Callable[[], Awaitable[T]]) -> T:
    """Wait until what the condition gives is true, and return it."""
    while not (result := await condition()):
        await asyncio.sleep(0.01)
    return result


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[AbstractConnection]:
    """Connect for the duration of the block."""
    async with await aio_pika.connect(url, **options) as connection:
        yield connection


@contextlib.asynccontextmanager
async def channel_of(url: str, **options: Any) -> AsyncIterator[AbstractChannel]:
    """Connect and open a channel for the duration of the block."""
    async with connected(url) as connection, connection.channel(**options) as channel:
        yield channel


async def queue_of(channel: AbstractChannel, name: str = "", **arguments: Any) -> AbstractQueue:
    """Declare an exclusive queue with these x-arguments."""
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    return await channel.declare_queue(name, exclusive=True, arguments=arguments)


async def send(channel: AbstractChannel, key: str, body: bytes = b"", **properties: Any) -> None:
    """Publish to a queue by its name, and wait for the confirm."""
    await channel.default_exchange.publish(Message(body, **properties), key)


async def got(queue: AbstractQueue) -> Any:
    """Wait for a message in the queue, and take it."""
    return await until(lambda: queue.get(no_ack=True, fail=False))


@pytest.mark.parametrize(("kind", "binding", "key", "other"), ROUTES)
def test_an_exchange_routes_as_its_type_says(
    url: str, kind: str, binding: str, key: str, other: str | None
) -> None:
    """What matches is confirmed, and what does not comes back, until it is unbound."""

    async def test() -> None:
        async with channel_of(url, on_return_raises=True) as channel:
            exchange = await channel.declare_exchange("e", kind)
            queue = await queue_of(channel)
            arguments = {"x-match": "all", "kind": binding}
            await queue.bind(exchange, binding, arguments=arguments)
            await exchange.publish(Message(b"1", headers={"kind": key}), key)
            message = await got(queue)
            assert (b"1", "e", key) == (message.body, message.exchange, message.routing_key)
            if other is not None:
                with pytest.raises(exceptions.PublishError):
                    await exchange.publish(Message(b"2", headers={"kind": other}), other)
            await queue.unbind(exchange, binding, arguments=arguments)
            with pytest.raises(exceptions.PublishError):
                await exchange.publish(Message(b"3", headers={"kind": key}), key)

    run(test)


def test_exchanges_are_bound_to_exchanges(url: str) -> None:
    """And unbound, and deleted."""

    async def test() -> None:
        async with channel_of(url, on_return_raises=True) as channel:
            source = await channel.declare_exchange("source", "topic")
            target = await channel.declare_exchange("target", "fanout", internal=True)
            await target.bind(source, "a.#")
            queue = await queue_of(channel)
            await queue.bind(target)
            await source.publish(Message(b"hello"), "a.b")
            assert b"hello" == (await got(queue)).body
            await target.unbind(source, "a.#")
            with pytest.raises(exceptions.PublishError):
                await source.publish(Message(b"hello"), "a.b")
            await target.delete()
            with pytest.raises(exceptions.ChannelNotFoundEntity):
                await channel.get_exchange("target")

    run(test)


def test_a_refusal_is_an_error_of_its_channel(url: str) -> None:
    """404, 405, 406 and 403 have errors of their own, and the connection goes on."""

    async def test() -> None:
        async with connected(url) as connection, connected(url) as owner:
            await queue_of(await owner.channel(), "mine")
            await (await owner.channel()).declare_queue("q", durable=True)
            cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
                (exceptions.ChannelNotFoundEntity, "no", {"passive": True}),
                (exceptions.ChannelPreconditionFailed, "q", {"durable": False}),
                (exceptions.ChannelClosed, "mine", {"passive": True}),
                (exceptions.ChannelClosed, "amq.reserved", {}),
            ]
            for error, name, options in cases:
                channel = await connection.channel()
                with pytest.raises(error):
                    await channel.declare_queue(name, **options)
                assert channel.is_closed
            assert await queue_of(await connection.channel())

    run(test)


def test_an_unroutable_message_comes_back(url: str) -> None:
    """As the result of the publish, with all that it had."""

    async def test() -> None:
        async with channel_of(url) as channel:
            returned = asyncio.get_running_loop().create_future()
            channel.return_callbacks.add(lambda _channel, message: returned.set_result(message))
            await channel.default_exchange.publish(
                Message(b"hello", headers=FIELDS, message_id="7"), "nowhere"
            )
            message = await returned
            assert (b"hello", "7", "nowhere") == (
                message.body,
                message.message_id,
                message.routing_key,
            )
            assert FIELDS == message.headers
            quiet = await channel.default_exchange.publish(
                Message(b"dropped"), "nowhere", mandatory=False
            )
            assert "Basic.Ack" == quiet.name

    run(test)


def test_publishes_are_confirmed_or_refused(url: str) -> None:
    """Many at once; a full queue refuses each that is too many."""

    async def test() -> None:
        async with channel_of(url) as channel:
            free = await queue_of(channel)
            full = await queue_of(channel, x_max_length=10, x_overflow="reject-publish")
            await asyncio.gather(*(send(channel, free.name) for _ in range(300)))
            results = await asyncio.gather(
                *(send(channel, full.name) for _ in range(20)), return_exceptions=True
            )
            assert [type(None)] * 10 + [exceptions.DeliveryError] * 10 == [
                type(result) for result in results
            ]
            assert 300 == (await free.purge()).message_count
            assert 10 == (await full.delete(if_unused=False, if_empty=False)).message_count

    run(test)


def test_every_property_arrives(url: str) -> None:
    """aio-pika gives times as datetimes, and the expiration in seconds."""
    properties = {
        "app_id": "app",
        "content_encoding": "utf-8",
        "content_type": "text/plain",
        "correlation_id": "correlation",
        "delivery_mode": DeliveryMode.PERSISTENT,
        "expiration": 600.0,
        "headers": {"a": 1},
        "message_id": "message",
        "priority": 7,
        "reply_to": "reply",
        "timestamp": datetime(2038, 1, 19, 3, 14, 8, tzinfo=timezone.utc),
        "type": "kind",
        "user_id": "guest",
    }

    async def test() -> None:
        async with channel_of(url) as channel:
            queue = await queue_of(channel)
            await send(channel, queue.name, **properties)
            message = await got(queue)
            assert properties == {name: getattr(message, name) for name in properties}

    run(test)


def test_every_type_of_field_arrives(url: str) -> None:
    """Also after the broker had to write the header anew, since it added x-death."""

    async def test() -> None:
        async with channel_of(url) as channel:
            parking = await queue_of(channel)
            queue = await queue_of(
                channel, x_dead_letter_exchange="", x_dead_letter_routing_key=parking.name
            )
            for _ in range(2):
                await send(channel, queue.name, headers=FIELDS)
            assert FIELDS == (await got(queue)).headers
            await (await queue.get()).reject(requeue=False)
            headers = (await got(parking)).headers
            assert FIELDS == {name: value for name, value in headers.items() if name in FIELDS}
            assert all(isinstance(headers[name], type(value)) for name, value in FIELDS.items())

    run(test)


def test_a_body_of_any_size_arrives(url: str) -> None:
    """Through basic.get and through basic.deliver."""

    async def test() -> None:
        async with channel_of(url) as channel:
            queue = await queue_of(channel)
            for size in BODY_SIZES:
                body = body_of(size)
                for _ in range(2):
                    await send(channel, queue.name, body)
                assert body == (await got(queue)).body
                async with queue.iterator(no_ack=True) as messages:
                    assert body == (await anext(messages)).body

    run(test)


def test_deliveries_are_bounded_and_settled(url: str) -> None:
    """prefetch, ack of several, nack and reject, with and without requeue."""

    async def test() -> None:
        async with channel_of(url) as channel:
            queue = await queue_of(channel)
            for number in range(7):
                await send(channel, queue.name, str(number).encode())
            await channel.set_qos(prefetch_count=3)
            async with queue.iterator() as messages:
                first = [await anext(messages) for _ in range(3)]
                await first[1].ack(multiple=True)
                second = [await anext(messages) for _ in range(2)]
                await second[1].nack(multiple=True, requeue=True)
                third = [await anext(messages) for _ in range(3)]
                await third[0].reject(requeue=False)
                last = await anext(messages)
                seen = [
                    [(message.body, message.redelivered) for message in each]
                    for each in (first, second, third, [last])
                ]
                for message in (*third[1:], last):
                    await message.ack()
                final = await anext(messages)
                await final.ack()
        assert [
            [(b"0", False), (b"1", False), (b"2", False)],
            [(b"3", False), (b"4", False)],
            [(b"2", True), (b"3", True), (b"4", True)],
            [(b"5", False)],
        ] == seen
        assert b"6" == final.body

    run(test)


def test_a_message_context_settles(url: str) -> None:
    """It acknowledges, rejects after an error, or requeues once if it is told to."""

    async def test() -> None:
        async with channel_of(url) as channel:
            queue = await queue_of(channel)
            await send(channel, queue.name)
            for redelivered in (False, True):
                message = await until(lambda: queue.get(fail=False))
                assert redelivered == message.redelivered
                with pytest.raises(ZeroDivisionError):
                    async with message.process(requeue=True, reject_on_redelivered=True):
                        raise ZeroDivisionError
            with pytest.raises(exceptions.QueueEmpty):
                await queue.get()

    run(test)


def test_counts_and_conditions(url: str) -> None:
    """declare, get, purge and delete say how many; if_empty and if_unused are heeded."""

    async def test() -> None:
        async with channel_of(url) as channel:
            queue = await channel.declare_queue("q")
            for _ in range(4):
                await send(channel, "q")
            counts = (await channel.declare_queue("q", passive=True)).declaration_result
            assert (4, 0) == (counts.message_count, counts.consumer_count)
            assert 3 == (await queue.get(no_ack=True)).message_count
            with pytest.raises(exceptions.ChannelPreconditionFailed):
                await queue.delete(if_empty=True)
        async with channel_of(url) as channel:
            queue = await channel.declare_queue("q")
            assert 3 == (await queue.purge()).message_count
            await queue.consume(print)
            counts = (await channel.declare_queue("q", passive=True)).declaration_result
            assert (0, 1) == (counts.message_count, counts.consumer_count)
            with pytest.raises(exceptions.ChannelPreconditionFailed):
                await queue.delete(if_unused=True)
        async with channel_of(url) as channel:
            queue = await channel.declare_queue("q")
            assert 0 == (await queue.delete()).message_count

    run(test)


def test_a_cancelled_consumer_gets_nothing_more(url: str) -> None:
    """And its tag may be used again."""

    async def test() -> None:
        async with channel_of(url) as channel:
            queue = await queue_of(channel)
            received: asyncio.Queue[Any] = asyncio.Queue()
            for body in (b"1", b"2"):
                assert "tag" == await queue.consume(received.put, consumer_tag="tag")
                await send(channel, queue.name, body)
                message = await received.get()
                assert ("tag", body) == (message.consumer_tag, message.body)
                await message.ack()
                await queue.cancel("tag")
                await send(channel, queue.name, b"kept")
                assert b"kept" == (await got(queue)).body
            assert received.empty()

    run(test)


def test_a_message_expires_and_is_a_dead_letter(url: str) -> None:
    """aio-pika's expiration is in seconds."""

    async def test() -> None:
        async with channel_of(url) as channel:
            dead = await channel.declare_exchange("dead", "headers")
            parking = await queue_of(channel)
            await parking.bind(dead, "", arguments={"x-match": "any", "kind": "a"})
            queue = await queue_of(channel, x_dead_letter_exchange="dead")
            await send(channel, queue.name, b"hello", expiration=0.02, headers={"kind": "a"})
            message = await got(parking)
            assert (b"hello", None) == (message.body, message.expiration)
            assert {
                "count": 1,
                "exchange": "",
                "original-expiration": "20",
                "queue": queue.name,
                "reason": "expired",
                "routing-keys": [queue.name],
            } == death_of(message.headers)

    run(test)


def test_remote_procedures_are_called(url: str) -> None:
    """aio-pika's RPC pattern has dead-letter and exclusive queues and returns; also for errors."""

    async def multiply(*, x: int, y: int) -> int:
        return x * y

    async def fail() -> None:
        raise ZeroDivisionError("on purpose")

    async def test() -> None:
        async with connected(url) as serving, connected(url) as asking:
            server = await RPC.create(await serving.channel())
            client = await RPC.create(await asking.channel())
            await server.register("multiply", multiply, auto_delete=True)
            await server.register("fail", fail, auto_delete=True)
            calls = [client.call("multiply", {"x": x, "y": 2}) for x in range(20)]
            assert [2 * x for x in range(20)] == await asyncio.gather(*calls)
            with pytest.raises(ZeroDivisionError):
                await client.call("fail")
            with pytest.raises(exceptions.MessageProcessError):
                await client.call("nobody")
            # A call that nobody takes in time comes back from the dead-letter exchange.
            await server.channel.declare_queue(
                "asleep", exclusive=True, arguments={"x-dead-letter-exchange": RPC.DLX_NAME}
            )
            with pytest.raises(asyncio.TimeoutError):
                await client.call("asleep", expiration=0)
            await client.close()
            await server.close()

    run(test)


def test_tasks_are_distributed(url: str) -> None:
    """aio-pika's Master and Worker pattern."""

    async def test() -> None:
        async with channel_of(url) as channel:
            master = Master(channel)
            done: list[int] = []

            async def work(*, number: int) -> None:
                done.append(number)

            worker = await master.create_worker("work", work, auto_delete=True)
            for number in range(20):
                await master.create_task("work", {"number": number})

            async def is_done() -> bool:
                return len(done) == 20

            await until(is_done)
            assert list(range(20)) == sorted(done)
            await worker.close()

    run(test)


def test_a_reply_comes_directly(url: str) -> None:
    """To the channel that asked."""

    async def test() -> None:
        async with channel_of(url) as channel, channel_of(url) as service:
            queue = await queue_of(service)
            replies = await channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
            answer = asyncio.get_running_loop().create_future()
            await replies.consume(answer.set_result, no_ack=True)
            await send(channel, queue.name, b"ping", reply_to="amq.rabbitmq.reply-to")
            request = await got(queue)
            await send(service, request.reply_to, request.body + b"-pong")
            assert b"ping-pong" == (await answer).body

    run(test)


def test_fifty_channels_share_a_connection(url: str) -> None:
    """All at once, and bodies of several frames stay whole."""

    async def test() -> None:
        async with connected(url) as connection:
            channels = await asyncio.gather(*(connection.channel() for _ in range(50)))
            assert 50 == len({channel.number for channel in channels})

            async def one(channel: AbstractChannel, number: int) -> None:
                queue = await queue_of(channel)
                body = body_of(FRAME_MAX + number)
                for _ in range(2):
                    await send(channel, queue.name, body)
                async with queue.iterator(no_ack=True) as messages:
                    assert [body, body] == [(await anext(messages)).body for _ in range(2)]

            await asyncio.gather(*map(one, channels, range(50)))

    run(test)


def test_a_connection_may_be_refused(url: str) -> None:
    """A wrong password and an unknown virtual host have errors of their own."""

    async def test() -> None:
        with pytest.raises(exceptions.AMQPConnectionError, match="ACCESS_REFUSED"):
            await aio_pika.connect(url.replace("guest:guest", "guest:wrong"))
        # aiormq expected another answer, and does not say what the broker said.
        with pytest.raises(exceptions.AMQPError, match=r"Connection\.Close"):
            await aio_pika.connect(url.rpartition("/")[0] + "/no%20such")

    run(test)


@pytest.mark.parametrize("way", ["close_connections", "cut"])
def test_a_robust_connection_comes_back(url: str, server: Server, way: str) -> None:
    """With its exchanges, queues, bindings and consumers, and what was not acknowledged."""

    async def test() -> None:
        connection = await aio_pika.connect_robust(url, reconnect_interval=0.1)
        async with connection:
            again = asyncio.Event()
            connection.reconnect_callbacks.add(lambda *_: again.set())
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=5)
            exchange = await channel.declare_exchange("e", "direct", auto_delete=True)
            queue = await channel.declare_queue("q", durable=True)
            exclusive = await channel.declare_queue(exclusive=True)
            for each in (queue, exclusive):
                await each.bind(exchange, "key")
            received: asyncio.Queue[Any] = asyncio.Queue()
            for each in (queue, exclusive):
                await each.consume(received.put)
            await exchange.publish(Message(b"before"), "key")
            assert [(b"before", False)] * 2 == [
                (message.body, message.redelivered)
                for message in [await received.get() for _ in range(2)]
            ]

            await asyncio.to_thread(getattr(server, way), url)
            await again.wait()

            message = await received.get()
            assert (b"before", True) == (message.body, message.redelivered)
            await message.ack()
            await exchange.publish(Message(b"after"), "key")
            for _ in range(2):
                message = await received.get()
                assert (b"after", False) == (message.body, message.redelivered)
                await message.ack()

    run(test)
