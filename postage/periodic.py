# SPDX-License-Identifier: MIT
"""Periodic jobs: methods that run at each due time, on one instance of a component.

Nobody's timer decides, but a message, the *baton*. It waits in the broker (`postage.delay`)
until the next run is due, and comes to the queue of the job then::

    postage-periodic-<component>.<job> ──baton──> the one active consumer ──> the run, a message
                  ^                                        │
                  └────────── the delay cascade <── the next baton

All instances consume that queue, which has a single active consumer: RabbitMQ elects the
*holder* and elects another one when it dies. The run is a message to the same queue, so
retries, outboxes, error queues and all kinds of handlers are those of other messages. Its id is
made of the job and the due time: a run that is repeated after a crash can be recognised.

An instance cannot see whether there is a baton, so each sends a *seed* when it starts and now
and then, which the holder drops if it knows of a baton, and replaces the baton for if not. Two
batons of a job merge, since their due times are on the same grid: the second one is dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import pika

from postage.delay import LONGEST, plain_seconds
from postage.errors import ConfigurationError, DecodeError, PostageError
from postage.futures import Future
from postage.handlers import MessageFilter, MessageHandler, MessageHandlerFullBody, Registration
from postage.messages import Message, new_message_id
from postage.microthreads import sleep
from postage.processor import MessageProcessor
from postage.retry import RetryPolicy
from postage.rpc import encoded
from postage.topology import DefaultExchange, Queue
from postage.transport.subscriber import Delivery

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

#: The queue of a job.
QUEUE = "postage-periodic-{component}.{job}"
#: The type of the messages that run a job, and of batons and seeds.
RUN, BATON = "periodic", "periodic-baton"

#: Seconds of the shortest interval: more often a timer of the component is better.
SHORTEST = 1.0
#: Seconds that a baton waits at a time. Then it comes back, and waits again: so a clock that was
#: set, or another time zone database, are heeded soon.
WAIT_AT_MOST = 3600.0
#: Seconds between two seeds of an instance.
SEED_EVERY = 300.0
#: Seconds after its due time at which a baton that did not come is taken for lost.
LOST_AFTER = 60.0
#: Seconds between two looks at whether the baton before is done with.
BUSY = 0.01

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
#: A baton that cannot be passed on is tried again for as long as it takes; what is none is parked.
_FOR_EVER = RetryPolicy(attempts=None, permanent=(DecodeError,))


# ------------------------------------------------------------------------- due times


@dataclass(frozen=True)
class Grid:
    """The due times of a job: each instance computes the same ones.

    ``every`` counts from 1970-01-01 in UTC, and not from when somebody started.

    Attributes:
        every: Seconds, as a timedelta; None: as `cron` says.
        cron: Five fields, as crontab has them.
        tz: The time zone of `cron`.
    """

    every: timedelta | None = None
    cron: str | None = None
    tz: tzinfo = timezone.utc

    @classmethod
    def of(
        cls, every: float | timedelta | None, cron: str | None, tz: str | tzinfo | None
    ) -> Grid:
        """Return the grid that a program asks for.

        Raises:
            ConfigurationError: It makes no sense, or needs a package that is not there.
        """
        if (every is None) == (cron is None):
            raise ConfigurationError("a periodic job needs every or cron, and not both")
        if every is not None:
            if tz is not None:
                raise ConfigurationError("tz is for cron: every counts seconds, which have no zone")
            seconds = plain_seconds("every", every)
            if not SHORTEST <= seconds <= LONGEST:
                raise ConfigurationError(
                    f"every is {every!r}: give at least {SHORTEST:g} second, at most 366 days"
                )
            return cls(every=timedelta(seconds=seconds))
        if not isinstance(cron, str) or len(cron.split()) != 5:
            raise ConfigurationError(
                f"cron is {cron!r}: give five fields, as in '30 4 * * MON-FRI'"
            )
        grid = cls(cron=" ".join(cron.split()), tz=_zone(tz))
        grid.after(datetime.now(timezone.utc))
        return grid

    @property
    def definition(self) -> str:
        """What it was made of: two grids that are equal have the same."""
        if self.every is not None:
            return f"every {self.every.total_seconds()!r} s"
        return f"cron {self.cron} {self.tz}"

    def after(self, moment: datetime) -> datetime:
        """Return the first due time after a moment, in UTC.

        Raises:
            ConfigurationError: The cron expression makes no sense, or never comes true.
        """
        if self.every is not None:
            return _EPOCH + ((moment - _EPOCH) // self.every + 1) * self.every
        assert self.cron is not None
        cronsim = _cronsim()
        try:
            times = cronsim.CronSim(self.cron.upper(), moment.astimezone(self.tz))
            due: datetime = next(times)
            return due.astimezone(timezone.utc)
        except cronsim.CronSimError as error:
            raise ConfigurationError(f"cron is {self.cron!r}: {error}") from None
        except StopIteration:
            raise ConfigurationError(f"cron is {self.cron!r}, which never comes true") from None


def _zone(tz: str | tzinfo | None) -> tzinfo:
    if tz is None:
        return timezone.utc
    if isinstance(tz, tzinfo):
        return tz
    try:
        return ZoneInfo(tz)
    except (OSError, ValueError, TypeError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise ConfigurationError(
            f"tz is {tz!r}: give the name of a time zone, as in 'Europe/Vienna'"
        ) from None


def _cronsim() -> Any:
    try:
        import cronsim
    except ImportError:
        raise ConfigurationError(
            "cron needs the package cronsim: pip install 'postage[schedule]'"
        ) from None
    return cronsim


# ------------------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Job:
    """A job of a component."""

    name: str
    grid: Grid


@dataclass(frozen=True)
class Baton:
    """What a baton says.

    Attributes:
        definition: Of the grid that it was made for.
        due: When the next run is due; None: it is a seed.
    """

    definition: str
    due: datetime | None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Baton:
        """Read one.

        Raises:
            DecodeError: It is none.
        """
        definition, due = content.get("definition"), content.get("due")
        if not isinstance(definition, str):
            raise DecodeError("a baton without a definition", content)
        return cls(definition, None if due is None else due_of(content))

    def content(self) -> dict[str, Any]:
        """Return what travels."""
        due = None if self.due is None else self.due.isoformat()
        return {"definition": self.definition, "due": due}


@dataclass(frozen=True)
class Step:
    """What a baton leads to.

    Attributes:
        run: The due time of the run that is to be started; None: none.
        due: That of the baton that goes on; None: it ends here.
    """

    run: datetime | None = None
    due: datetime | None = None


#: The baton is one too many.
DROP = Step()


@dataclass(frozen=True)
class Known:
    """What the holder of a job knows.

    Attributes:
        run: The due time of the latest run that it started.
        due: That of the baton that it sent last.
    """

    run: datetime | None = None
    due: datetime | None = None

    def decide(self, grid: Grid, baton: Baton, now: datetime) -> Step:
        """Decide about a baton that has come."""
        if baton.due is None or baton.definition != grid.definition:
            if self.due is None:
                return Step(due=grid.after(now))
            is_lost = now - self.due > timedelta(seconds=LOST_AFTER)
            return Step(due=self.due) if is_lost else DROP
        if self.run is not None and baton.due <= self.run:
            return DROP
        if baton.due > now:
            return Step(due=baton.due)
        return Step(run=baton.due, due=grid.after(max(baton.due, now)))

    def noted(self, step: Step) -> Known:
        """Return what is known after a step."""
        return Known(step.run or self.run, step.due or self.due)

    def elected(self) -> Known:
        """Return what is known by who becomes the holder: others have sent batons since."""
        return Known(self.run)


def due_of(content: Mapping[str, Any]) -> datetime:
    """Return the due time in a run or a baton.

    Raises:
        DecodeError: There is none.
    """
    try:
        due = datetime.fromisoformat(content["due"])
    except (KeyError, TypeError, ValueError):
        raise DecodeError("no due time", content) from None
    if due.utcoffset() is None:
        raise DecodeError("a due time without a time zone", content)
    return due


# ------------------------------------------------------------------------- declaring


class Periodic(MessageHandler):
    """Marks a method of a component that runs at each due time, on one instance.

    It is called with the due time, in UTC, and may be plain, a generator, a coroutine or
    threaded. The class also derives from `PeriodicJobs`.

    Args:
        name: The job; None: the method's name. Of all instances of a component, those jobs are
            one that have the same name.
        every: Seconds, or a timedelta, counted from 1970-01-01 in UTC.
        cron: Five fields, as crontab has them, instead.
        tz: The time zone of `cron`: a name or a tzinfo; None: UTC.
        threaded: As for `MessageHandler`.
        outbox: As for `MessageHandler`.
        retry: As for `MessageHandler`.

    Raises:
        ConfigurationError: The due times make no sense, or cron's package is not there.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        every: float | timedelta | None = None,
        cron: str | None = None,
        tz: str | tzinfo | None = None,
        threaded: bool = False,
        outbox: bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigurationError(f"the name of a periodic job is a string, not {name!r}")
        super().__init__(RUN, name, threaded, outbox=outbox, retry=retry)
        self.name = name
        self.grid = Grid.of(every, cron, tz)

    def __call__(self, decorated: F) -> F:
        """Note on a method that it is a job."""
        job = Job(self.name or decorated.__name__, self.grid)
        category, kind, _name, body_key = self.handler_data
        self.handler_data = (category, kind, job.name, body_key)
        decorated = super().__call__(MessageFilter(due_of)(decorated))
        jobs = (*getattr(decorated, "_periodic_jobs", ()), job)
        decorated._periodic_jobs = jobs  # type: ignore[attr-defined]  # ours
        return decorated


def jobs_of(component: type[MessageProcessor]) -> dict[str, Job]:
    """Return the jobs of a component by name, those of its bases included.

    Raises:
        ConfigurationError: Two have the same name and different due times.
    """
    jobs: dict[str, Job] = {}
    for (_category, kind, name), registrations in component._message_handlers.items():
        for registration in registrations if kind == RUN else ():
            for job in _noted(component, registration.attribute):
                if job.name == name and jobs.setdefault(job.name, job) != job:
                    raise ConfigurationError(
                        f"{component.__name__} has two periodic jobs {name!r} with other due times"
                    )
    return jobs


def _noted(component: type, attribute: str) -> Iterator[Job]:
    """Yield the jobs of a method; the most derived class that decorates it says which."""
    for base in component.__mro__:
        if jobs := getattr(vars(base).get(attribute), "_periodic_jobs", ()):
            yield from jobs
            return


# --------------------------------------------------------------------------- running


class _Chain:
    """The runs of a job, as one instance sees them."""

    def __init__(self, component: str, job: Job) -> None:
        self.job = job
        self.queue = QUEUE.format(component=component, job=job.name)
        self.id = f"{component}.{job.name}"
        self.known = Known()
        self.consumer_tag = ""
        self.is_busy = False


class PeriodicJobs(MessageProcessor):
    """The base of components with periodic jobs: methods that `Periodic` decorates.

    Put it before other bases, as in ``class Accounts(PeriodicJobs, GenericApplication)``. Its
    arguments are theirs, and the fingerprint needs a name.

    Raises:
        ConfigurationError: The fingerprint has no name, or two jobs have the same one.
        PostageError: As the other bases.
    """

    def __init__(self, *args: Any, **kwds: Any) -> None:
        super().__init__(*args, **kwds)
        self._chains: dict[str, _Chain] = {}
        try:
            self._join_jobs()
        except BaseException:
            self.close()
            raise

    def main(self) -> Generator[Any, Any, None]:
        """Run, as every component, and see that each job has its baton."""
        if self.scheduler is not None:
            self.add_timeout(0.0, self._seed)
        yield from super().main()

    @MessageHandlerFullBody(BATON, outbox=False, retry=_FOR_EVER)
    def msg_periodic_baton(self, body: Mapping[str, Any]) -> Generator[Any, Any, None]:
        """Start the run that is due, then send the baton to wait for the next one."""
        chain = self._chains.get(body["name"])
        if chain is None:
            raise DecodeError(f"there is no periodic job {body['name']!r} here", body)
        while chain.is_busy:  # two batons that are looked at together would both start a run
            yield sleep(BUSY)
        chain.is_busy = True
        try:
            # As long as a consumer lives that RabbitMQ has made the active one, it stays that.
            if chain.consumer_tag != self.delivery.consumer_tag:
                chain.consumer_tag = self.delivery.consumer_tag
                chain.known = chain.known.elected()
            now = datetime.now(timezone.utc)
            step = chain.known.decide(chain.job.grid, Baton.of(body["content"]), now)
            if step.run is not None:
                yield self._send_run(chain, step.run)
            if step.due is not None:
                wait = (step.due - now).total_seconds()
                yield self._send_baton(chain, step.due, min(max(0.0, wait), WAIT_AT_MOST))
            chain.known = chain.known.noted(step)
        finally:
            chain.is_busy = False

    def _note_success(self, delivery: Delivery, registration: Registration) -> None:
        """Let no baton close the circuit breaker: it says nothing about the work."""
        if registration.attribute != "msg_periodic_baton":
            super()._note_success(delivery, registration)

    def _join_jobs(self) -> None:
        component = str(self.fingerprint.get("name") or "")
        for job in jobs_of(type(self)).values():
            if not component:
                raise ConfigurationError(
                    "the fingerprint of a component with periodic jobs needs a 'name', by which "
                    "its instances find each other"
                )
            chain = self._chains[job.name] = _Chain(component, job)
            queue = Queue(chain.queue, single_active_consumer=True)
            self.consumer.queue_bind(DefaultExchange, queue, chain.queue)

    def _seed(self) -> None:
        for chain in self._chains.values():
            try:
                sent = self._send_baton(chain, None)
            except PostageError as error:
                logger.warning("no seed for the periodic job %s: %s", chain.id, error)
            else:
                sent.when_ready(partial(_check_seed, chain, sent))
        self.add_timeout(SEED_EVERY, self._seed)

    def _send_run(self, chain: _Chain, due: datetime) -> Future[None]:
        message_id = f"{chain.id}@{due.isoformat()}"
        logger.info("the periodic job %s is due: %s", chain.id, due.isoformat())
        return self._send(chain, RUN, {"due": due.isoformat()}, message_id)

    def _send_baton(
        self, chain: _Chain, due: datetime | None, delay: float = 0.0
    ) -> Future[None]:
        content = Baton(chain.job.grid.definition, due).content()
        return self._send(chain, BATON, content, new_message_id(), delay)

    def _send(
        self,
        chain: _Chain,
        kind: str,
        content: Mapping[str, Any],
        message_id: str,
        delay: float = 0.0,
    ) -> Future[None]:
        message = Message()
        message.body |= {"type": kind, "name": chain.job.name, "content": dict(content)}
        message.fingerprint(self.fingerprint)
        encoder = self.consumer.encoder
        properties = pika.BasicProperties(
            content_type=encoder.content_type or None,
            delivery_mode=2,
            message_id=message_id,
            timestamp=int(time.time()),
            app_id=str(self.fingerprint["name"]),
        )
        body = encoded(encoder, message.body)
        return self.consumer.publish(chain.queue, body, properties, mandatory=True, delay=delay)


def _check_seed(chain: _Chain, sent: Future[None]) -> None:
    try:
        sent.result()
    except PostageError as error:
        logger.warning("no seed for the periodic job %s: %s", chain.id, error)
