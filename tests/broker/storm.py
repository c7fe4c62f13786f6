# SPDX-License-Identifier: MIT
"""Clients that do anything at random: most of it allowed, some of it not, some of it nonsense."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from pika import spec

from postage.broker import fields
from postage.broker.connection import Phase
from tests.broker.wire import Caller, Desk, body, frame, header, method, short

QUEUES = (b"q", b"r", b"s")
EXCHANGES = (b"a", b"b", b"amq.direct")
ODD_NAMES = (b"", b"x" * 255, b"amq.gen-1", b"amq.rabbitmq.reply-to", b"\xff", "é".encode())
NO_TABLE = bytes(4)
#: A count that cannot be counted further.
LARGEST_DEATH = fields.array(
    [
        fields.table(
            {
                "count": fields.encode(2**63 - 1),
                "queue": fields.encode("q"),
                "reason": fields.encode("rejected"),
            }
        )
    ]
)
#: Arguments that queues may have.
ARGUMENTS: dict[str, tuple[bytes, ...]] = {
    "x-message-ttl": (fields.encode(0), fields.encode(5)),
    "x-expires": (fields.encode(5),),
    "x-dead-letter-exchange": (fields.encode(""), fields.encode("a")),
    "x-max-length": (fields.encode(2), fields.encode(0)),
    "x-max-length-bytes": (fields.encode(5),),
    "x-overflow": (fields.encode("reject-publish"), fields.encode("reject-publish-dlx")),
    "x-max-priority": (fields.encode(5),),
    "x-single-active-consumer": (b"t\1",),
    "x-delivery-limit": (fields.encode(1),),
    "x-dead-letter-strategy": (fields.encode("at-least-once"),),
}
OF_QUORUM_QUEUES = {"x-delivery-limit", "x-dead-letter-strategy"}
#: Any field, for headers.
ANY_FIELDS = (
    b"V",
    b"t\1",
    b"I\xff\xff\xff\xff",
    b"S\0\0\0\1\xff",
    b"A\0\0\0\0",
    fields.array([b"S\0\0\0\1r", b"V"]),
    b"F\0\0\0\0",
    b"D\xff\x7f\xff\xff\xff",
    LARGEST_DEATH,
)
HEADERS = ("CC", "BCC", "x-death", "x-match", "x-first-death-queue", "other")


class Storm:
    """Some clients of one broker, who act at random.

    Args:
        chance: decides everything, so that a storm can be repeated.
    """

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.desk = Desk()
        self.callers = [self.desk.opened(channels=3) for _ in range(3)]
        self._addresses: list[bytes] = []
        for payload in self._declarations():
            # Some are refused: each has a client of its own.
            caller = self.desk.opened()
            caller.send(frame(spec.FRAME_METHOD, 1, payload))
            caller.connection.lost()

    def rage(self, steps: int) -> None:
        """Do so many things."""
        for _ in range(steps):
            self._step(self.chance.randrange(len(self.callers)))

    def calm_down(self) -> None:
        """Take all clients away, and delete all queues."""
        for caller in self.callers:
            caller.connection.lost()
        self.desk.node.finish_turn()
        host = self.desk.node.vhosts["/"]
        for queue in tuple(host.queues.values()):
            assert 0 == queue.unsettled, queue
            host.delete_queue(queue)
        # There may have been circles of dead letters, which end with their queues.
        self.desk.node.finish_turn()
        while self.desk.node.has_more:
            self.desk.node.finish_turn()

    def _step(self, number: int) -> None:
        caller = self.callers[number]
        if caller.connection.phase is not Phase.OPEN:
            caller.connection.lost()
            caller = self.callers[number] = self.desk.opened(channels=3)
        channel = self.chance.randrange(1, 4)
        kind = self.chance.random()
        if kind < 0.05:
            self.desk.pass_time(self.chance.choice((0.001, 0.005, 1)))
            return
        if kind < 0.055:
            caller.connection.lost()
            return
        method_frame = frame(spec.FRAME_METHOD, channel, self._payload(caller, channel))
        self._send(caller, self._publishing(channel) if kind < 0.4 else method_frame)
        caller.take()
        for each, opened in tuple(caller.connection.channels.items()):
            if opened.is_closing:
                caller.ask(method(spec.Channel.CloseOk(), each) + method(spec.Channel.Open(), each))

    def _send(self, caller: Caller, data: bytes) -> None:
        size = self.chance.choice((1, 7, len(data), len(data), len(data), len(data)))
        if self.desk.node.has_more:  # a circle of dead letters takes time in every turn
            size = len(data)
        for start in range(0, len(data), size):
            caller.send(data[start : start + size])

    # What is sent

    def _queue(self) -> bytes:
        return short(self._one(QUEUES))

    def _exchange(self) -> bytes:
        return short(self._one(EXCHANGES))

    def _one(self, names: tuple[bytes, ...]) -> bytes:
        return self.chance.choice(ODD_NAMES if self.chance.random() < 0.03 else names)

    def _bits(self, number: int, chance: float = 0.1) -> bytes:
        is_any = self.chance.random() < chance
        return bytes([self.chance.randrange(1 << number) if is_any else 0])

    def _declarations(self) -> list[bytes]:
        kinds = (b"direct", b"fanout", b"topic", b"headers")
        declarations = [
            b"\0\x28\0\x0a\0\0" + short(name) + short(self.chance.choice(kinds)) + bits + NO_TABLE
            for name, bits in ((b"a", b"\0"), (b"b", b"\4"))
        ]
        declarations.append(b"\0\x28\0\x1e\0\0" + short(b"a") + short(b"b") + b"\1#\0" + NO_TABLE)
        for queue in QUEUES:
            is_quorum = self.chance.random() < 0.3
            bits = b"\2" if is_quorum else self.chance.choice((b"\0", b"\2", b"\x08"))
            table = fields.join(self._arguments(is_quorum))
            declarations.append(b"\0\x32\0\x0a\0\0" + short(queue) + bits + table)
            declarations += [
                b"\0\x32\0\x14\0\0" + short(queue) + short(exchange) + self._queue() + b"\0\0\0\0\0"
                for exchange in EXCHANGES
                if self.chance.random() < 0.6
            ]
        return declarations

    def _arguments(self, is_quorum: bool) -> dict[str, bytes]:
        names = self.chance.sample([*ARGUMENTS], self.chance.randrange(5))
        if self.chance.random() < 0.95:
            forbidden = {"x-max-priority"} if is_quorum else OF_QUORUM_QUEUES
            names = [name for name in names if name not in forbidden]
        arguments = {name: self.chance.choice(ARGUMENTS[name]) for name in names}
        if "x-dead-letter-exchange" in arguments and self.chance.random() < 0.7:
            key = self.chance.choice(QUEUES)
            arguments["x-dead-letter-routing-key"] = fields.encode(key.decode())
        if is_quorum:
            arguments["x-queue-type"] = fields.encode("quorum")
        return arguments

    def _publishing(self, channel: int) -> bytes:
        key = self._queue()
        if self._addresses and self.chance.random() < 0.1:
            key = short(self.chance.choice(self._addresses))
        exchange = b"\0" if self.chance.random() < 0.5 else self._exchange()
        publish = b"\0\x3c\0\x28\0\0" + exchange + key + self._bits(1, 0.3)
        size = self.chance.choice((0, 1, 5, 5000))
        data, cut = bytes(size), self.chance.randrange(size + 1)
        pieces = (data[:cut], data[cut:]) if self.chance.random() < 0.3 else (data,)
        frames = frame(spec.FRAME_METHOD, channel, publish)
        frames += header(size, self._properties(), channel=channel)
        return frames + b"".join(body(piece, channel) for piece in pieces if size)

    def _properties(self) -> bytes:
        flags, values = 0, b""
        for flag, value in (
            (1 << 13, self._headers()),
            (1 << 12, self.chance.choice((b"\1", b"\2"))),
            (1 << 11, b"\3"),
            (1 << 9, short(self.chance.choice((b"q", b"amq.rabbitmq.reply-to")))),
            (1 << 8, short(self.chance.choice((b"0", b"5", b"1000")))),
            (1 << 4, b"\5guest"),
        ):
            if self.chance.random() < 0.3:
                flags |= flag
                values += value
        if self.chance.random() < 0.01:
            values = values[:-1] + b"\xff"
        return struct.pack(">H", flags) + values

    def _headers(self) -> bytes:
        names = self.chance.sample(HEADERS, self.chance.randrange(3))
        table = {name: self.chance.choice(ANY_FIELDS) for name in names}
        if self.chance.random() < 0.3:
            table["x-death"] = LARGEST_DEATH
        for name in {"CC", "BCC"} & {*names}:
            table[name] = fields.array([b"S\0\0\0\1r", b"V"])
        return fields.join(table)

    def _payload(self, caller: Caller, channel: int) -> bytes:
        """Return the payload of some method."""
        opened = caller.connection.channels.get(channel)
        tags = [*opened.unsettled] if opened is not None else []
        number = self.chance.choice(tags) if tags else self.chance.choice((0, 2**64 - 1))
        tag = struct.pack(">Q", number)
        consumers = [*opened.consumers] if opened is not None else []
        consumer = short(self.chance.choice(consumers or ["none"]).encode())
        queue, exchange, key = self._queue(), self._exchange(), self._queue()
        choices: list[tuple[float, Callable[[], bytes]]] = [
            (2, lambda: self.chance.choice(self._declarations())),
            (0.3, lambda: b"\0\x28\0\x14\0\0" + exchange + self._bits(2)),
            (0.3, lambda: b"\0\x28\0\x28\0\0" + exchange + exchange + key + b"\0" + NO_TABLE),
            (2, lambda: b"\0\x32\0\x14\0\0" + queue + exchange + key + b"\0" + NO_TABLE),
            (0.5, lambda: b"\0\x32\0\x1e\0\0" + queue + self._bits(1)),
            (0.7, lambda: b"\0\x32\0\x28\0\0" + queue + self._bits(3)),
            (1, lambda: b"\0\x32\0\x32\0\0" + queue + exchange + key + NO_TABLE),
            (2, lambda: b"\0\x3c\0\x0a" + bytes(5) + b"\2" + self._bits(1, 0.5)),
            (6, lambda: b"\0\x3c\0\x14\0\0" + queue + b"\0" + self._bits(3, 0.3) + NO_TABLE),
            (1, lambda: b"\0\x3c\0\x14\0\0\x15amq.rabbitmq.reply-to\0\2" + NO_TABLE),
            (2, lambda: b"\0\x3c\0\x1e" + consumer + self._bits(1)),
            (8, lambda: b"\0\x3c\0\x46\0\0" + queue + self._bits(1, 0.5)),
            (0.3, lambda: b"\0\x55\0\x0a\0"),
            (0.5, lambda: b"\0\x14\0\x28" + bytes(7)),
            (0.5, lambda: b"\0\x5a\0\x0a"),
            (0.1, lambda: self.chance.randbytes(self.chance.randrange(40))),
        ]
        if opened is not None and opened.transaction is not None:
            choices += [(4, lambda: b"\0\x5a\0\x14"), (2, lambda: b"\0\x5a\0\x1e")]
        if tags or self.chance.random() < 0.02:
            choices += [
                (14, lambda: b"\0\x3c\0\x50" + tag + self._bits(1)),
                (8, lambda: b"\0\x3c\0\x78" + tag + self._bits(2, 0.5)),
                (8, lambda: b"\0\x3c\0\x5a" + tag + self._bits(1, 0.5)),
                (1, lambda: b"\0\x3c\0\x6e\1"),
            ]
        if opened is not None and opened._reply_address is not None:
            self._addresses = [opened._reply_address.encode()]
        weights = [weight for weight, _ in choices]
        return self.chance.choices([choice for _, choice in choices], weights)[0]()
