# SPDX-License-Identifier: MIT
"""Declaring, purging and deleting queues."""

from __future__ import annotations

from typing import Any

from pika import spec

from tests.broker.differential.codec import Field
from tests.broker.differential.driver import Stage
from tests.broker.differential.registry import each, scenario


@scenario
def a_queue_is_declared_and_declared_again(stage: Stage) -> None:
    """Declaring twice is no error, and the second answer tells what is in the queue."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable")
    channel.publish("q", "one")
    channel.declare("q", "durable")


@each(
    plain=((), {}),
    durable=(("durable",), {}),
    auto_delete=(("auto_delete",), {}),
    exclusive=(("exclusive",), {}),
    durable_auto_delete=(("durable", "auto_delete"), {}),
    quorum=(("durable",), {"x_queue_type": "quorum"}),
    classic=(("durable",), {"x_queue_type": "classic"}),
)
def any_two_kinds_of_queue_are_not_the_same(stage: Stage, case: Any) -> None:
    """What exists is declared with what it has: else 406 names the first difference."""
    flags, arguments = case
    client = stage.connect()
    client.open().declare("q", *flags, **arguments)
    client.open().declare("q", *flags, **arguments)
    client.open().declare("q")
    client.open().declare("q", "durable")
    client.open().declare("q", "auto_delete")
    client.open().declare("q", "exclusive")


@each(
    message_ttl=("x_message_ttl", 60_000, 60_001),
    expires=("x_expires", 60_000, 60_001),
    max_length=("x_max_length", 5, 6),
    max_length_bytes=("x_max_length_bytes", 500, 501),
    overflow=("x_overflow", "reject-publish", "drop-head"),
    dead_letter_exchange=("x_dead_letter_exchange", "dlx", "other"),
    max_priority=("x_max_priority", 5, 6),
    queue_mode=("x_queue_mode", "lazy", "default"),
    single_active_consumer=("x_single_active_consumer", True, False),
    unknown=("x_unknown", 1, 2),
)
def an_argument_of_another_value_is_refused(stage: Stage, case: Any) -> None:
    """The 406 names the argument and both values; what RabbitMQ does not know may differ."""
    name, value, other = case
    client = stage.connect()
    client.open().declare("q", **{name: value})
    client.open().declare("q", **{name: other})
    client.open().declare("q")


@scenario
def an_argument_of_another_integer_type_is_the_same(stage: Stage) -> None:
    """An argument is compared by its number, whatever the size of the integer."""
    client = stage.connect()
    client.open().declare("q", x_message_ttl=Field("l", 1000))
    client.open().declare("q", x_message_ttl=Field("s", 1000))
    client.open().declare("q", x_message_ttl=Field("i", 1000))
    client.open().declare("q", x_message_ttl=Field("l", 1001))


@scenario
def a_dead_letter_routing_key_that_differs_is_refused(stage: Stage) -> None:
    """The routing key of dead letters is compared as well."""
    client = stage.connect()
    client.open().declare("q", x_dead_letter_exchange="dlx", x_dead_letter_routing_key="one")
    client.open().declare("q", x_dead_letter_exchange="dlx", x_dead_letter_routing_key="two")
    client.open().declare("q", x_dead_letter_exchange="dlx")


@each(
    delivery_limit=("x_delivery_limit", 5, 6),
    max_length=("x_max_length", 5, 6),
    dead_letter_exchange=("x_dead_letter_exchange", "dlx", "other"),
    message_ttl=("x_message_ttl", 1000, 1001),
    queue_type=("x_queue_type", "quorum", "classic"),
    dead_letter_strategy=("x_dead_letter_strategy", "at-most-once", "at-least-once"),
    quorum_initial_group_size=("x_quorum_initial_group_size", 1, 3),
)
def an_argument_of_a_quorum_queue_that_differs_is_refused(stage: Stage, case: Any) -> None:
    """A quorum queue compares its own arguments too."""
    name, value, other = case
    client = stage.connect()
    quorum = {"x_queue_type": "quorum"}
    client.open().declare("q", "durable", **{**quorum, name: value})
    client.open().declare("q", "durable", **{**quorum, name: other})
    client.open().declare("q", "durable", **quorum)


@each(
    ttl_negative={"x_message_ttl": -1},
    ttl_text={"x_message_ttl": "10"},
    ttl_double={"x_message_ttl": Field("d", 10.0)},
    ttl_bool={"x_message_ttl": True},
    ttl_none={"x_message_ttl": None},
    ttl_zero={"x_message_ttl": 0},
    ttl_too_big={"x_message_ttl": 2**32},
    ttl_biggest={"x_message_ttl": 2**32 - 1},
    ttl_short={"x_message_ttl": Field("s", 10)},
    ttl_octet={"x_message_ttl": Field("b", 10)},
    expires_zero={"x_expires": 0},
    expires_negative={"x_expires": -1},
    expires_text={"x_expires": "10"},
    expires_too_big={"x_expires": 2**32},
    max_length_negative={"x_max_length": -1},
    max_length_text={"x_max_length": "10"},
    max_length_zero={"x_max_length": 0},
    max_length_bytes_negative={"x_max_length_bytes": -1},
    max_length_bytes_text={"x_max_length_bytes": "10"},
    max_priority_negative={"x_max_priority": -1},
    max_priority_zero={"x_max_priority": 0},
    max_priority_256={"x_max_priority": 256},
    max_priority_255={"x_max_priority": 255},
    max_priority_text={"x_max_priority": "5"},
    overflow_unknown={"x_overflow": "unknown"},
    overflow_number={"x_overflow": 1},
    overflow_dlx={"x_overflow": "reject-publish-dlx"},
    dead_letter_exchange_number={"x_dead_letter_exchange": 1},
    dead_letter_exchange_empty={"x_dead_letter_exchange": ""},
    dead_letter_exchange_missing={"x_dead_letter_exchange": "missing"},
    dead_letter_routing_key_alone={"x_dead_letter_routing_key": "key"},
    dead_letter_routing_key_number={"x_dead_letter_exchange": "", "x_dead_letter_routing_key": 1},
    queue_type_unknown={"x_queue_type": "unknown"},
    queue_type_number={"x_queue_type": 1},
    queue_mode_unknown={"x_queue_mode": "unknown"},
    queue_mode_number={"x_queue_mode": 1},
    queue_version_2={"x_queue_version": 2},
    queue_version_3={"x_queue_version": 3},
    single_active_consumer_text={"x_single_active_consumer": "yes"},
    delivery_limit_on_classic={"x_delivery_limit": 5},
    dead_letter_strategy_on_classic={"x_dead_letter_strategy": "at-least-once"},
    group_size_on_classic={"x_quorum_initial_group_size": 3},
    max_age_on_classic={"x_max_age": "1D"},
    master_locator={"x_queue_master_locator": "min-masters"},
    leader_locator={"x_queue_leader_locator": "client-local"},
    consumer_timeout={"x_consumer_timeout": 1000},
    consumer_timeout_text={"x_consumer_timeout": "1000"},
    unknown={"x_unknown": "value"},
    unknown_without_x={"unknown": Field("d", 1.5)},
    two_bad={"x_message_ttl": -1, "x_expires": 0},
)
def arguments_are_checked(stage: Stage, arguments: Any) -> None:
    """A classic queue is made, or refused with 406 and the reason."""
    channel = stage.open()
    channel.declare("q", "durable", **arguments)


@each(
    plain={},
    everything={
        "x_delivery_limit": 5,
        "x_message_ttl": 60_000,
        "x_expires": 60_000,
        "x_max_length": 10,
        "x_max_length_bytes": 1000,
        "x_single_active_consumer": True,
        "x_dead_letter_exchange": "",
        "x_dead_letter_routing_key": "dead",
        "x_dead_letter_strategy": "at-least-once",
        "x_overflow": "reject-publish",
    },
    max_priority={"x_max_priority": 5},
    lazy={"x_queue_mode": "lazy"},
    master_locator={"x_queue_master_locator": "min-masters"},
    delivery_limit_zero={"x_delivery_limit": 0},
    delivery_limit_negative={"x_delivery_limit": -1},
    delivery_limit_text={"x_delivery_limit": "5"},
    overflow_dlx={"x_overflow": "reject-publish-dlx"},
    overflow_drop_head={"x_overflow": "drop-head"},
    strategy_unknown={"x_dead_letter_strategy": "unknown"},
    strategy_number={"x_dead_letter_strategy": 1},
    strategy_without_dead_letter_exchange={"x_dead_letter_strategy": "at-least-once"},
    strategy_with_drop_head={
        "x_dead_letter_strategy": "at-least-once",
        "x_dead_letter_exchange": "",
        "x_overflow": "drop-head",
    },
    group_size_zero={"x_quorum_initial_group_size": 0},
    group_size_three={"x_quorum_initial_group_size": 3},
    group_size_text={"x_quorum_initial_group_size": "3"},
    in_memory_length={"x_max_in_memory_length": 5},
    in_memory_bytes_negative={"x_max_in_memory_bytes": -5},
    leader_locator={"x_queue_leader_locator": "balanced"},
    leader_locator_unknown={"x_queue_leader_locator": "unknown"},
    consumer_timeout={"x_consumer_timeout": 1000},
    max_age={"x_max_age": "1D"},
    unknown={"x_unknown": "value"},
)
def arguments_of_quorum_queues_are_checked(stage: Stage, arguments: Any) -> None:
    """A quorum queue knows some arguments that a classic one does not, and the other way round."""
    channel = stage.open()
    channel.declare("q", "durable", x_queue_type="quorum", **arguments)


@each(
    transient=(),
    exclusive=("durable", "exclusive"),
    auto_delete=("durable", "auto_delete"),
    transient_exclusive=("exclusive",),
    transient_auto_delete=("auto_delete",),
)
def a_quorum_queue_is_durable_and_shared(stage: Stage, flags: Any) -> None:
    """Quorum queues can be neither transient nor exclusive nor auto-delete."""
    channel = stage.open()
    channel.declare("q", *flags, x_queue_type="quorum")


@scenario
def a_quorum_queue_is_not_named_by_the_server(stage: Stage) -> None:
    """Only classic queues may have names that the server makes."""
    stage.open().declare("", "durable", x_queue_type="quorum")


@scenario
def passive_only_looks(stage: Stage) -> None:
    """A passive declaration compares nothing, and tells the counts."""
    channel = stage.open(confirm=True)
    channel.declare("q", "durable", x_max_length=5)
    channel.publish("q", "one")
    channel.publish("q", "two")
    channel.consume("q", "c", "no_ack")
    channel.take(2)
    channel.declare("q", "passive")
    channel.declare("q", "passive", "auto_delete", x_max_length=-1)


@scenario
def passive_does_not_make_what_is_missing(stage: Stage) -> None:
    """A passive declaration of what is missing is 404."""
    client = stage.connect()
    client.open().declare("missing", "passive")
    client.open().declare("amq.missing", "passive")
    client.open().declare("missing", "passive")


@scenario
def names_that_begin_with_amq_are_reserved(stage: Stage) -> None:
    """Declaring such a name is 403."""
    client = stage.connect()
    client.open().declare("amq.mine")
    client.open().declare("amq.")
    client.open().declare("amqp", "exclusive")
    client.open().declare("AMQ.mine", "exclusive")


@scenario
def names_of_255_bytes_may_hold_anything(stage: Stage) -> None:
    """A name may be as long as a short string, and hold any characters."""
    channel = stage.open(confirm=True)
    long = "ü" * 127 + "x"
    channel.declare(long)
    channel.publish(long, "one")
    channel.get(long, "no_ack")
    channel.declare("with space/and\nline, 'quoted' % \N{SNOWMAN}")
    channel.delete(long)


@scenario
def an_empty_name_means_the_last_declared_queue(stage: Stage) -> None:
    """The server names the queue, and an empty name then means it, on this channel."""
    channel = stage.open(confirm=True)
    channel.declare("", "exclusive")
    channel.bind("", "amq.direct", "key")
    channel.bind("", "amq.direct", "")
    channel.publish("key", "one", "mandatory", exchange="amq.direct")
    channel.publish("", "two", "mandatory", exchange="amq.direct")
    channel.get("", "no_ack")
    channel.purge("")
    channel.consume("", "c")
    channel.cancel("c")
    channel.unbind("", "amq.direct", "key")
    channel.declare("", "exclusive")
    channel.delete("")
    channel.get("")


@each(
    bind=lambda channel: channel.bind("", "amq.direct", "key"),
    unbind=lambda channel: channel.unbind("", "amq.direct", "key"),
    get=lambda channel: channel.get(""),
    purge=lambda channel: channel.purge(""),
    consume=lambda channel: channel.consume("", "c"),
    delete=lambda channel: channel.delete(""),
    passive=lambda channel: channel.declare("", "passive"),
)
def an_empty_name_without_a_declared_queue_is_refused(stage: Stage, act: Any) -> None:
    """If no queue was declared on the channel, an empty name means nothing."""
    act(stage.open())


@scenario
def the_last_declared_queue_is_of_the_channel(stage: Stage) -> None:
    """Each channel remembers its own queue; a named one, and a passive one, count too."""
    client = stage.connect()
    first, second = client.open(), client.open()
    first.declare("q")
    first.purge("")
    second.declare("q", "passive")
    second.purge("")
    second.delete("q")
    first.purge("")


@scenario
def an_exclusive_queue_is_locked_for_other_connections(stage: Stage) -> None:
    """Whatever another connection does to it is 405; publishing to it is free."""
    owner, other = stage.connect(), stage.connect()
    owner.open().declare("q", "exclusive")
    other.open().declare("q", "exclusive")
    other.open().declare("q")
    other.open().declare("q", "durable", "exclusive")
    other.open().declare("q", "passive")
    other.open().get("q")
    other.open().consume("q", "c")
    other.open().purge("q")
    other.open().bind("q", "amq.direct", "key")
    other.open().unbind("q", "amq.direct", "key")
    other.open().delete("q")
    other.open(confirm=True).publish("q", "one", "mandatory")
    owner.open().get("q", "no_ack")


@scenario
def an_exclusive_queue_is_shared_by_the_channels_of_its_connection(stage: Stage) -> None:
    """All channels of the connection may use it, until the connection ends."""
    owner, other = stage.connect(), stage.connect()
    owner.open().declare("q", "exclusive")
    channel = owner.open()
    channel.declare("q", "exclusive")
    channel.consume("q", "c")
    owner.open().declare("q")
    owner.close()
    stage.gone("q")
    other.open().declare("q", "passive")


@scenario
def an_exclusive_queue_ends_when_its_connection_is_cut(stage: Stage) -> None:
    """A connection that is lost takes its exclusive queues along, also durable ones."""
    owner, other = stage.connect(), stage.connect()
    owner.open().declare("q", "exclusive", "durable")
    owner.cut()
    stage.gone("q")
    other.open().declare("q", "exclusive")


@scenario
def an_auto_delete_queue_goes_with_its_last_consumer(stage: Stage) -> None:
    """It lives until it had a consumer and has none any more."""
    channel = stage.open()
    channel.declare("q", "auto_delete")
    channel.consume("q", "one")
    channel.consume("q", "two")
    channel.cancel("one")
    channel.declare("q", "passive")
    channel.cancel("two")
    stage.gone("q")


@scenario
def an_auto_delete_queue_goes_with_the_channel_of_its_consumer(stage: Stage) -> None:
    """Closing the channel cancels the consumer, and what was unacknowledged goes with the queue."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "auto_delete")
    channel.publish("q", "one")
    consumer = client.open()
    consumer.consume("q", "one")
    consumer.take()
    consumer.close()
    stage.gone("q")


@scenario
def an_auto_delete_queue_without_consumers_stays(stage: Stage) -> None:
    """basic.get is no consumer."""
    channel = stage.open(confirm=True)
    channel.declare("q", "auto_delete")
    channel.publish("q", "one")
    channel.get("q", "no_ack")
    stage.count("q", 0)


@scenario
def deleting_a_queue_tells_how_many_messages_were_in_it(stage: Stage) -> None:
    """Ready messages are counted, and a queue that is missing is deleted without an error."""
    channel = stage.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one")
    channel.publish("q", "two")
    channel.publish("q", "three")
    channel.get("q")
    channel.delete("q")
    channel.delete("q")
    channel.delete("missing", "if_unused", "if_empty")
    channel.ack(1)
    channel.sync()


@scenario
def a_queue_in_use_is_not_deleted_if_unused(stage: Stage) -> None:
    """if-unused is about consumers, and 406 if there are any."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one")
    channel.delete("q", "if_unused")
    channel.declare("q")
    channel.consume("q", "c")
    client.open().delete("q", "if_unused")
    client.open().delete("q", "if_unused", "if_empty")
    channel.cancel("c")
    channel.delete("q", "if_unused")


@scenario
def a_queue_with_messages_is_not_deleted_if_empty(stage: Stage) -> None:
    """if-empty is about ready messages, and 406 if there are any."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q")
    channel.publish("q", "one")
    client.open().delete("q", "if_empty")
    channel.get("q")
    client.open().delete("q", "if_empty")
    stage.gone("q")


@scenario
def a_quorum_queue_cannot_be_deleted_conditionally(stage: Stage) -> None:
    """if-unused and if-empty are not implemented for quorum queues."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", x_queue_type="quorum")
    channel.publish("q", "one")
    channel.delete("q", "if_unused")
    stage.connect().open().delete("q", "if_empty")
    stage.connect().open().delete("q")


@each(classic={}, quorum={"x_queue_type": "quorum"})
def purging_tells_how_many_messages_are_gone(stage: Stage, arguments: Any) -> None:
    """A purge takes what is ready, and leaves what is unacknowledged."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.declare("q", "durable", **arguments)
    channel.purge("q")
    for body in ("one", "two", "three"):
        channel.publish("q", body)
    channel.get("q")
    channel.purge("q")
    channel.nack(1, "requeue")
    stage.drain("q", 1)
    client.open().purge("missing")


@scenario
def nowait_is_not_answered(stage: Stage) -> None:
    """With nowait there is no answer, but an error closes the channel."""
    client = stage.connect()
    channel = client.open(confirm=True)
    channel.tell(spec.Queue.Declare(queue="q", nowait=True))
    fanout: Any = "fanout"  # pika: of the type of its default, an enum
    channel.tell(spec.Exchange.Declare(exchange="e", type=fanout, nowait=True))
    channel.tell(spec.Queue.Bind(queue="q", exchange="e", nowait=True))
    channel.publish("", "one", "mandatory", exchange="e")
    channel.tell(spec.Queue.Purge(queue="q", nowait=True))
    channel.tell(spec.Basic.Consume(queue="q", consumer_tag="c", nowait=True))
    channel.publish("q", "two")
    channel.take()
    channel.tell(spec.Basic.Cancel(consumer_tag="c", nowait=True))
    channel.tell(spec.Exchange.Delete(exchange="e", nowait=True))
    channel.tell(spec.Queue.Delete(queue="q", nowait=True))
    channel.declare("q", "passive")
    stage.connect().open().declare_exchange("e", "fanout", "passive")


@scenario
def an_error_closes_the_channel_without_an_answer_to_nowait(stage: Stage) -> None:
    """The close names the method, as it would without nowait."""
    channel = stage.open()
    channel.tell(spec.Queue.Declare(queue="missing", passive=True, nowait=True))
    channel.take()


@scenario
def what_follows_an_error_on_a_channel_is_ignored(stage: Stage) -> None:
    """Until close-ok comes, the broker throws away what the client had sent."""
    client = stage.connect()
    channel = client.open()
    channel.tell(spec.Queue.Declare(queue="missing", passive=True))
    channel.tell(spec.Queue.Declare(queue="q"))
    channel.take()
    client.open().declare("q", "passive")
