# SPDX-License-Identifier: MIT
"""The four types of exchanges and their routing tables: section 3.1.3 of AMQP 0-9-1.

An exchange maps a message to destinations, by one step. Who follows bindings between exchanges,
alternate exchanges and auto-delete is the virtual host. Nothing here does I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeAlias, TypeVar

from postage.broker import erlang, fields

if TYPE_CHECKING:
    from postage.broker.queues import Queue

#: Two are the same only if they are one object; nothing else is asked of them here.
Destination: TypeAlias = "Queue | Exchange"

#: Gives the header fields of the message that is routed.
HeaderSource = Callable[[], Mapping[str, bytes]]


@dataclass(frozen=True)
class Binding:
    """What binds a destination: another key or other arguments make another binding."""

    destination: Destination
    key: str = ""
    arguments: Mapping[str, bytes] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.destination, self.key, frozenset(self.arguments.items())))


Key = TypeVar("Key", bound=Hashable)


class _Table(Generic[Key]):
    """Destinations by key, which count how many bindings lead to them."""

    def __init__(self) -> None:
        self._counts: dict[Key, dict[Destination, int]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._counts

    def add(self, key: Key, destination: Destination) -> None:
        counts = self._counts.setdefault(key, {})
        counts[destination] = counts.get(destination, 0) + 1

    def remove(self, key: Key, destination: Destination) -> None:
        counts = self._counts[key]
        counts[destination] -= 1
        if not counts[destination]:
            del counts[destination]
        if not counts:
            del self._counts[key]

    def of(self, keys: Iterable[Key]) -> set[Destination]:
        return {found for key in keys for found in self._counts.get(key, ())}


class Exchange(ABC):
    """An exchange and its bindings; its subclasses are the types of exchanges.

    A subclass sets `type`, says in `route` where messages go, and keeps the table which it needs
    for that: it is made by `_prepare` and brought up to date by `_add` and `_remove`.
    `check` refuses arguments of bindings.

    Args:
        name: the name, empty for the default exchange.
        arguments: the declared arguments, as encoded fields.
    """

    #: The type that clients declare.
    type: ClassVar[str]

    def __init__(
        self,
        name: str,
        *,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name = name
        self.durable = durable
        self.auto_delete = auto_delete
        self.internal = internal
        self.arguments = dict(arguments or {})
        # By destination, and in order: a queue that goes must not cost a walk over all bindings.
        self._bindings: dict[Destination, dict[Binding, None]] = {}
        self._prepare()

    def __repr__(self) -> str:
        bindings = sum(map(len, self._bindings.values()))
        return f"<{type(self).__name__} {self.name!r} [{bindings} bindings]>"

    @property
    def alternate(self) -> str | None:
        """The name of the exchange for messages that find no queue here."""
        name = fields.decode(self.arguments.get("alternate-exchange", _VOID))
        return name if isinstance(name, str) else None

    @property
    def bindings(self) -> Iterator[Binding]:
        """All bindings."""
        return (binding for bound in self._bindings.values() for binding in bound)

    @property
    def has_bindings(self) -> bool:
        """Whether anything is bound."""
        return bool(self._bindings)

    def leads_to(self, destination: Destination) -> bool:
        """Tell whether a destination is bound."""
        return destination in self._bindings

    def bind(self, destination: Destination, key: str, arguments: Mapping[str, bytes]) -> bool:
        """Add a binding, and return whether it is new.

        Raises:
            ValueError: if `check` refuses the arguments.
        """
        self.check(arguments)
        binding = Binding(destination, key, dict(arguments))
        if binding in self._bindings.get(destination, ()):
            return False
        self._bindings.setdefault(destination, {})[binding] = None
        self._add(binding)
        return True

    def unbind(self, destination: Destination, key: str, arguments: Mapping[str, bytes]) -> bool:
        """Remove a binding, and return whether it was there."""
        binding = Binding(destination, key, arguments)
        bound = self._bindings.get(destination, {})
        if binding not in bound:
            return False
        del bound[binding]
        if not bound:
            del self._bindings[destination]
        self._remove(binding)
        return True

    def unbind_all(self, destination: Destination) -> list[Binding]:
        """Remove the bindings of a destination, and return them."""
        removed = list(self._bindings.pop(destination, ()))
        for binding in removed:
            self._remove(binding)
        return removed

    def check(self, arguments: Mapping[str, bytes]) -> None:  # noqa: B027 - most take any
        """Refuse arguments with which nothing can be bound to this type of exchange.

        Raises:
            ValueError: with the text of RabbitMQ.
        """

    @abstractmethod
    def route(self, keys: Sequence[str], headers: HeaderSource) -> set[Destination]:
        """Return where a message goes.

        Args:
            keys: the routing key and those of the headers CC and BCC.
            headers: is called only if the type of exchange looks at the headers.
        """

    def _prepare(self) -> None:  # noqa: B027 - the fanout exchange has no table
        """Make the empty table."""

    @abstractmethod
    def _add(self, binding: Binding) -> None:
        """Take up a new binding."""

    @abstractmethod
    def _remove(self, binding: Binding) -> None:
        """Drop a binding that exists."""


class Direct(Exchange):
    """Routes to what is bound with the key of the message."""

    type = "direct"

    def route(self, keys: Sequence[str], headers: HeaderSource) -> set[Destination]:
        return self._table.of(keys)

    def _prepare(self) -> None:
        self._table: _Table[str] = _Table()

    def _add(self, binding: Binding) -> None:
        self._table.add(binding.key, binding.destination)

    def _remove(self, binding: Binding) -> None:
        self._table.remove(binding.key, binding.destination)


class Fanout(Exchange):
    """Routes to all that is bound."""

    type = "fanout"

    def route(self, keys: Sequence[str], headers: HeaderSource) -> set[Destination]:
        return set(self._bindings)

    def _add(self, binding: Binding) -> None:
        pass

    def _remove(self, binding: Binding) -> None:
        pass


class _Node:
    """Where some words of binding keys lead to."""

    __slots__ = ("children", "is_hash")

    def __init__(self, is_hash: bool = False) -> None:
        self.children: dict[str, _Node] = {}
        #: Whether the last word is ``#``, which takes any further word.
        self.is_hash = is_hash


class Topic(Exchange):
    """Routes to what is bound with a pattern for the key, in which ``*`` is a word, ``#`` any.

    The patterns are a trie of words. A routing key is followed through all of its branches at
    once: the cost grows with the branches that match, and no pattern makes it exponential.
    """

    type = "topic"

    def route(self, keys: Sequence[str], headers: HeaderSource) -> set[Destination]:
        return self._table.of(node for key in keys for node in self._matching(_words(key)))

    def _prepare(self) -> None:
        self._root = _Node()
        self._table: _Table[_Node] = _Table()

    def _add(self, binding: Binding) -> None:
        node = self._root
        for word in _words(binding.key):
            if word not in node.children:
                node.children[word] = _Node(is_hash=word == "#")
            node = node.children[word]
        self._table.add(node, binding.destination)

    def _remove(self, binding: Binding) -> None:
        node = self._root
        path = []
        for word in _words(binding.key):
            path.append((node, word))
            node = node.children[word]
        self._table.remove(node, binding.destination)
        while path and not node.children and node not in self._table:
            node, word = path.pop()
            del node.children[word]

    def _matching(self, words: Iterable[str]) -> Iterable[_Node]:
        nodes = _with_hashes([self._root])
        for word in words:
            # A dict is a set that keeps the order, which makes a run repeatable.
            reached = dict.fromkeys(node for node in nodes if node.is_hash)
            for node in nodes:
                for edge in (word, "*"):
                    if edge in node.children:
                        reached[node.children[edge]] = None
            nodes = _with_hashes(reached)
        return nodes


class Headers(Exchange):
    """Routes to what is bound with arguments that the headers of the message have.

    The argument ``x-match`` says whether ``all`` must be there, which is the default, or ``any``.
    Other arguments that begin with ``x-`` count only for ``all-with-x`` and ``any-with-x``.
    A void argument asks for the header with any value.
    """

    type = "headers"

    def check(self, arguments: Mapping[str, bytes]) -> None:
        match = arguments.get("x-match", _ALL)
        if match in _MATCHES:
            return
        value = erlang.field(match)
        if match[:1] == b"S":
            raise ValueError(
                f"Invalid x-match field value {value}; expected all, any, all-with-x, or any-with-x"
            )
        raise ValueError(
            f"Invalid x-match field type {erlang.TYPE_NAMES[match[:1]]} (value {value}); "
            "expected longstr"
        )

    def route(self, keys: Sequence[str], headers: HeaderSource) -> set[Destination]:
        present: set[_Condition] = set()
        for name, value in headers().items():
            present.add((name, _comparable(value)))
            present.add((name, None))
        found = self._any.of(present)
        for condition in (*present, _ALWAYS):
            for binding, conditions in self._all.get(condition, {}).items():
                if conditions <= present:
                    found.add(binding.destination)
        return found

    def _prepare(self) -> None:
        #: The bindings of which one condition suffices, by each of their conditions.
        self._any: _Table[_Condition] = _Table()
        #: Those that have all of their conditions met, by one of these, which is in `_filed`.
        self._all: dict[_Condition, dict[Binding, frozenset[_Condition]]] = {}
        self._filed: dict[Binding, _Condition] = {}

    def _add(self, binding: Binding) -> None:
        is_any, conditions = _parse(binding.arguments)
        if is_any:
            for condition in conditions:
                self._any.add(condition, binding.destination)
            return
        # The rarest one, so that a message meets few bindings that it does not match.
        rarest = min(conditions, key=lambda c: len(self._all.get(c, ())), default=_ALWAYS)
        self._all.setdefault(rarest, {})[binding] = conditions
        self._filed[binding] = rarest

    def _remove(self, binding: Binding) -> None:
        is_any, conditions = _parse(binding.arguments)
        if is_any:
            for condition in conditions:
                self._any.remove(condition, binding.destination)
            return
        filed = self._filed.pop(binding)
        del self._all[filed][binding]
        if not self._all[filed]:
            del self._all[filed]


#: The types of exchanges by the name that clients declare.
TYPES: dict[str, type[Exchange]] = {
    exchange.type: exchange for exchange in (Direct, Fanout, Headers, Topic)
}

#: The name of a header with its value, or with None if the header need only be there.
_Condition = tuple[str, Hashable]

#: Where the bindings are filed that have no condition, perhaps beside some that have this one.
_ALWAYS: _Condition = ("", None)

_VOID = fields.encode(None)
_ALL = fields.encode("all")
_ANY = fields.encode("any")
_ALL_WITH_X = fields.encode("all-with-x")
_ANY_WITH_X = fields.encode("any-with-x")
_MATCHES = frozenset({_ALL, _ANY, _ALL_WITH_X, _ANY_WITH_X})


def _words(key: str) -> list[str]:
    """Return the words of a key. As in RabbitMQ the empty key has none."""
    return key.split(".") if key else []


def _with_hashes(nodes: Iterable[_Node]) -> Iterable[_Node]:
    """Return nodes and those that are reached from them by a ``#`` which takes no word."""
    closed = dict.fromkeys(nodes)
    unfollowed = list(closed)
    while unfollowed:
        child = unfollowed.pop().children.get("#")
        if child is not None and child not in closed:
            closed[child] = None
            unfollowed.append(child)
    return closed


def _parse(arguments: Mapping[str, bytes]) -> tuple[bool, frozenset[_Condition]]:
    """Return whether any condition suffices, and the conditions."""
    match = arguments.get("x-match", _ALL)
    with_x = match in (_ALL_WITH_X, _ANY_WITH_X)
    conditions = frozenset(
        (name, _comparable(value))
        for name, value in arguments.items()
        if name != "x-match" and (with_x or not name.startswith("x-"))
    )
    return match in (_ANY, _ANY_WITH_X), conditions


def _comparable(field: bytes) -> Hashable:
    """Return what two fields have in common that match each other, None for void.

    RabbitMQ compares the values, and not their types: a string matches bytes, and the numbers of
    all types match each other, and times (`rabbit_exchange_type_headers:headers_match`).
    """
    match field[:1]:
        case b"S" | b"x":
            return field[5:]
        case b"T":
            return int.from_bytes(field[1:], "big")
        case b"V":
            return None
        case b"t":
            # In a tuple, since True equals 1 in Python.
            return (field[1:] != b"\0",)
        case b"A" | b"F" | b"D":
            # An empty array is an empty table in Erlang.
            return (field if field[1:] != bytes(4) else "nothing",)
        case _:
            return fields.decode(field)
