# SPDX-License-Identifier: MIT
"""What clients say about exchanges and queues (AMQP 0-9-1, classes exchange and queue)."""

from __future__ import annotations

from pika import amqp_object, spec

from postage.broker import frames
from postage.broker.channel import Channel, Handler
from postage.broker.errors import not_found
from postage.broker.vhost import REPLY_TO, check_not_default


def declare_exchange(channel: Channel, method: spec.Exchange.Declare, payload: bytes) -> None:
    """Make an exchange, or see whether it is there."""
    if method.passive:
        check_not_default(method.exchange)
        channel.vhost.exchange(method.exchange)
    else:
        channel.vhost.declare_exchange(
            _on_one_line(method.exchange),
            method.type,
            frames.arguments_of(type(method), payload),
            durable=method.durable,
            auto_delete=method.auto_delete,
            internal=method.internal,
        )
    if not method.nowait:
        channel.send(spec.Exchange.DeclareOk())


def delete_exchange(channel: Channel, method: spec.Exchange.Delete, payload: bytes) -> None:
    """Delete an exchange."""
    channel.vhost.delete_exchange(method.exchange, if_unused=method.if_unused)
    if not method.nowait:
        channel.send(spec.Exchange.DeleteOk())


def bind_exchange(channel: Channel, method: spec.Exchange.Bind, payload: bytes) -> None:
    """Bind an exchange to another (RabbitMQ, exchange to exchange bindings)."""
    raw = frames.arguments_of(type(method), payload)
    check_not_default(method.source)
    check_not_default(method.destination)
    channel.vhost.exchange(method.source)
    destination = channel.vhost.exchange(method.destination)
    channel.vhost.bind(method.source, destination, method.routing_key, raw)
    if not method.nowait:
        channel.send(spec.Exchange.BindOk())


def unbind_exchange(channel: Channel, method: spec.Exchange.Unbind, payload: bytes) -> None:
    """Unbind an exchange from another."""
    raw = frames.arguments_of(type(method), payload)
    check_not_default(method.source)
    check_not_default(method.destination)
    destination = channel.vhost.exchanges.get(method.destination)
    # RabbitMQ takes the unbinding of what is not there for done.
    if destination is not None:
        channel.vhost.unbind(method.source, destination, method.routing_key, raw)
    if not method.nowait:
        channel.send(spec.Exchange.UnbindOk())


def declare_queue(channel: Channel, method: spec.Queue.Declare, payload: bytes) -> None:
    """Make a queue, or see whether it is there and how full it is."""
    if method.queue.startswith(REPLY_TO):
        _declare_replies(channel, method)
        return
    if method.passive:
        queue = channel.vhost.queue(method.queue, channel.connection)
        queue.use()
    else:
        queue = channel.vhost.declare_queue(
            _on_one_line(method.queue),
            frames.arguments_of(type(method), payload),
            channel.connection,
            durable=method.durable,
            exclusive=method.exclusive,
            auto_delete=method.auto_delete,
            is_strict=channel.node.is_strict,
        )
    channel.last_queue = queue.name
    if not method.nowait:
        channel.send(spec.Queue.DeclareOk(queue.name, queue.count, len(queue.consumers)))


def _declare_replies(channel: Channel, method: spec.Queue.Declare) -> None:
    """Tell whether a caller is still there: its address can be declared for that."""
    if method.queue != REPLY_TO and not channel.vhost.is_caller(method.queue):
        raise not_found("queue", method.queue, channel.vhost.name)
    if not method.nowait:
        channel.send(spec.Queue.DeclareOk(method.queue, 0, 1))


def bind_queue(channel: Channel, method: spec.Queue.Bind, payload: bytes) -> None:
    """Bind a queue to an exchange."""
    raw = frames.arguments_of(type(method), payload)
    check_not_default(method.exchange)
    channel.vhost.exchange(method.exchange)
    queue = channel.queue(method.queue)
    channel.vhost.bind(method.exchange, queue, _key(channel, method), raw)
    if not method.nowait:
        channel.send(spec.Queue.BindOk())


def unbind_queue(channel: Channel, method: spec.Queue.Unbind, payload: bytes) -> None:
    """Unbind a queue from an exchange."""
    raw = frames.arguments_of(type(method), payload)
    check_not_default(method.exchange)
    # RabbitMQ lets anybody unbind, also a queue that is exclusive to another connection.
    queue = channel.vhost.queues.get(method.queue or channel.last_queue or "")
    if queue is None and not method.queue:
        queue = channel.queue(method.queue)
    if queue is not None:
        channel.vhost.unbind(method.exchange, queue, _key(channel, method), raw)
    channel.send(spec.Queue.UnbindOk())


def purge_queue(channel: Channel, method: spec.Queue.Purge, payload: bytes) -> None:
    """Throw away what waits in a queue."""
    number = channel.queue(method.queue).purge()
    if not method.nowait:
        channel.send(spec.Queue.PurgeOk(number))


def delete_queue(channel: Channel, method: spec.Queue.Delete, payload: bytes) -> None:
    """Delete a queue. It is no error if there is none."""
    name = method.queue
    number = 0
    if not name or name in channel.vhost.queues:
        number = channel.vhost.delete_queue(
            channel.queue(name), if_unused=method.if_unused, if_empty=method.if_empty
        )
    if not method.nowait:
        channel.send(spec.Queue.DeleteOk(number))


def grant_access(channel: Channel, method: spec.Access.Request, payload: bytes) -> None:
    """Give a ticket, as RabbitMQ does to clients of AMQP 0-8. It is good for nothing."""
    channel.send(spec.Access.RequestOk(1))


def _on_one_line(name: str) -> str:
    # As RabbitMQ does with the names that are declared.
    return name.replace("\r", "").replace("\n", "")


def _key(channel: Channel, method: spec.Queue.Bind | spec.Queue.Unbind) -> str:
    # Without both names, the queue that was declared last is bound by its name.
    if not method.queue and not method.routing_key:
        return channel.last_queue or ""
    key: str = method.routing_key
    return key


#: What a channel does with the methods of these classes.
HANDLERS: dict[type[amqp_object.Method], Handler] = {
    spec.Access.Request: grant_access,
    spec.Exchange.Bind: bind_exchange,
    spec.Exchange.Declare: declare_exchange,
    spec.Exchange.Delete: delete_exchange,
    spec.Exchange.Unbind: unbind_exchange,
    spec.Queue.Bind: bind_queue,
    spec.Queue.Declare: declare_queue,
    spec.Queue.Delete: delete_queue,
    spec.Queue.Purge: purge_queue,
    spec.Queue.Unbind: unbind_queue,
}
