# SPDX-License-Identifier: MIT
"""Periodic jobs: each due time has its run, on one instance, whoever dies."""

from __future__ import annotations

import asyncio
import builtins
import collections
import math
import random
import threading
from collections.abc import Callable, Generator
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import pika
import pytest

from postage import periodic
from postage.errors import ConfigurationError, DecodeError
from postage.generic_application import GenericApplication
from postage.messaging import Fingerprint, GenericProducer, MessageProcessor
from postage.microthreads import MicroScheduler, sleep
from postage.periodic import DROP, Baton, Grid, Job, Known, Periodic, PeriodicJobs, Step, jobs_of
from postage.topology import error_queue
from tests.nodes import Node
from tests.programs import Program
from tests.waiting import wait_until

#: Of error queues.
ARGUMENTS = {"x-queue-type": "quorum"}
PROGRAM = "tests/programs_for_tests/periodic_jobs.py"
SECOND = timedelta(seconds=1)


def at(text: str) -> datetime:
    """Read a time of 2026 in UTC: "03-29 01:00"."""
    return datetime.fromisoformat(f"2026-{text}+00:00")


# ------------------------------------------------------------------------- due times


def test_every_counts_from_the_epoch() -> None:
    """So that all instances agree, whenever they started."""
    grid = Grid.of(90, None, None)
    assert at("01-01 00:01:30") == grid.after(at("01-01 00:00"))
    assert at("01-01 00:03") == grid.after(at("01-01 00:01:30"))
    assert at("01-01 00:03") == grid.after(at("01-01 00:02:59.999999"))


@pytest.mark.parametrize("every", [1, 1.5, 0.1 * 15, timedelta(days=7), 7.123457])
def test_due_times_follow_each_other_without_gap_or_repetition(every: Any) -> None:
    """A due time leads to the next one, exactly one interval later, for intervals of all kinds."""
    grid = Grid.of(every, None, None)
    first = grid.after(at("01-01 00:00"))
    second = grid.after(first)
    assert grid.every == second - first
    assert second == grid.after(second - timedelta(microseconds=1))


def test_cron_is_read_in_its_time_zone() -> None:
    """Four o'clock in Vienna is three in UTC in winter, and two in summer."""
    grid = Grid.of(None, "0 4 * * *", "Europe/Vienna")
    assert at("01-02 03:00") == grid.after(at("01-01 03:00"))
    assert at("07-01 02:00") == grid.after(at("07-01 01:59:59"))


def test_cron_without_a_time_zone_is_in_utc() -> None:
    """Wherever the instances are."""
    assert at("01-01 04:00") == Grid.of(None, "0 4 * * *", None).after(at("01-01 00:00"))


def test_an_hour_that_is_skipped_has_its_run_when_it_ends() -> None:
    """On 29 March 2026 it is 3:00 in Vienna right after 1:59, so 2:30 is run at 3:00."""
    grid = Grid.of(None, "30 2 * * *", "Europe/Vienna")
    assert at("03-29 01:00") == grid.after(at("03-28 12:00"))
    assert at("03-30 00:30") == grid.after(at("03-29 01:00"))


def test_an_hour_that_comes_twice_has_one_run() -> None:
    """On 25 October 2026 it is 2:30 in Vienna at 0:30 and at 1:30 UTC."""
    grid = Grid.of(None, "30 2 * * *", "Europe/Vienna")
    assert at("10-25 00:30") == grid.after(at("10-24 12:00"))
    assert at("10-26 01:30") == grid.after(at("10-25 00:30"))


def test_what_runs_every_hour_runs_in_both_hours_of_the_same_name() -> None:
    """As in crontab: only jobs at a fixed hour are kept from running twice."""
    grid = Grid.of(None, "0 * * * *", "Europe/Vienna")
    due = [grid.after(at("10-24 23:30"))]
    for _ in range(3):
        due.append(grid.after(due[-1]))
    assert [at(f"10-25 0{hour}:00") for hour in range(4)] == due


@pytest.mark.parametrize("tz", [ZoneInfo("Asia/Tokyo"), timezone(timedelta(hours=9)), "Asia/Tokyo"])
def test_a_time_zone_is_a_name_or_a_tzinfo(tz: Any) -> None:
    """Whatever the program has."""
    assert at("01-01 15:00") == Grid.of(None, "0 0 * * *", tz).after(at("01-01 00:00"))


def test_equal_grids_have_equal_definitions_and_others_others() -> None:
    """By the definition an instance tells its batons from those of other code."""
    cron = Grid.of(None, "0 4 * * *", None)
    assert cron.definition == Grid.of(None, " 0  4 * * * ", None).definition
    assert Grid.of(60, None, None) == Grid.of(timedelta(minutes=1), None, None)
    others = [
        cron,
        Grid.of(None, "0 4 * * *", "Europe/Vienna"),
        Grid.of(None, "0 5 * * *", None),
        Grid.of(1_000_000, None, None),
        Grid.of(1_000_001, None, None),
    ]
    assert len(others) == len({grid.definition for grid in others})


@pytest.mark.parametrize(
    ("every", "cron", "tz"),
    [
        (None, None, None),
        (60, "* * * * *", None),
        (60, None, "UTC"),
        *[(each, None, None) for each in (0, -1, 0.9, math.nan, math.inf, True, "60", 367 * 86400)],
        (timedelta(0), None, None),
        *[
            (None, each, None)
            for each in (
                "",
                "soon",
                "* * * *",
                "* * * * * *",
                "60 * * * *",
                "0 0 31 2 *",
                "0 0 */30 2 MON#5",
                7,
            )
        ],
        (None, "* * * * *", "Nowhere/Land"),
        (None, "* * * * *", "../../etc/passwd"),
        (None, "* * * * *", ""),
        (None, "* * * * *", 7),
    ],
)
def test_due_times_that_make_no_sense_are_refused(every: Any, cron: Any, tz: Any) -> None:
    """When the class is defined, and not at four in the morning."""
    with pytest.raises(ConfigurationError):
        Periodic(every=every, cron=cron, tz=tz)


def test_without_its_package_cron_says_which_one_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And jobs with every need none."""
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwds: Any) -> Any:
        if name == "cronsim":
            raise ImportError(name)
        return imported(name, *args, **kwds)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigurationError, match=r"postage\[schedule\]"):
        Periodic(cron="* * * * *")
    Periodic(every=1)


@pytest.mark.parametrize("name", ["", 7])
def test_a_job_has_a_name(name: Any) -> None:
    """Its queue is called after it."""
    with pytest.raises(ConfigurationError, match="name"):
        Periodic(name, every=1)


# ------------------------------------------------------------------------- decisions

GRID = Grid.of(60, None, None)
MINE = GRID.definition
SEED = Baton(MINE, None)
NOON = at("01-01 12:00")
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("known", "baton", "now", "step"),
    [
        # seeds
        (Known(), SEED, NOON, Step(due=NOON + MINUTE)),
        (Known(due=NOON + MINUTE), SEED, NOON, DROP),
        (Known(due=NOON), SEED, NOON + MINUTE, DROP),
        (Known(due=NOON), SEED, NOON + MINUTE + SECOND, Step(due=NOON)),  # it was lost
        # batons
        (Known(), Baton(MINE, NOON), NOON, Step(NOON, NOON + MINUTE)),
        (Known(run=NOON), Baton(MINE, NOON), NOON, DROP),
        (Known(run=NOON), Baton(MINE, NOON - MINUTE), NOON, DROP),
        (Known(), Baton(MINE, NOON), NOON - SECOND, Step(due=NOON)),  # too early by our clock
        # missed while everything was down: one run, then on with the grid
        (Known(), Baton(MINE, NOON), NOON + 99.5 * MINUTE, Step(NOON, NOON + 100 * MINUTE)),
        # those of other code
        (Known(), Baton("every 7.0 s", NOON), NOON, Step(due=NOON + MINUTE)),
        (Known(due=NOON + MINUTE), Baton("every 7.0 s", NOON), NOON, DROP),
    ],
)
def test_the_holder_decides(known: Known, baton: Baton, now: datetime, step: Step) -> None:
    """From what it knows, the baton and the clock alone."""
    assert step == known.decide(GRID, baton, now)


def test_a_clock_that_is_set_back_repeats_no_run() -> None:
    """The due times that were run are known, and the next one is after them."""
    known = Known()
    step = known.decide(GRID, Baton(MINE, NOON), NOON)
    known = known.noted(step)
    back = NOON - timedelta(hours=1)
    assert Step(due=NOON + MINUTE) == known.decide(GRID, Baton(MINE, NOON + MINUTE), back)
    assert DROP == known.decide(GRID, Baton(MINE, NOON), back)
    assert DROP == known.decide(GRID, SEED, back)


def test_a_clock_that_is_set_forward_leaves_out_what_it_has_skipped() -> None:
    """There is one run for all that was missed."""
    step = Known(run=NOON - MINUTE).decide(GRID, Baton(MINE, NOON), NOON + timedelta(hours=1))
    assert Step(NOON, NOON + timedelta(hours=1, minutes=1)) == step


class World:
    """A broker and a component in a nutshell: batons that wait, and one holder at a time.

    The clock goes on with the next event. Whatever the holder does may be cut off by its death:
    then the baton is there again for the next holder. Another one may become the holder at any
    time, too, as when a connection is lost.
    """

    def __init__(self, seed: int, grid: Grid) -> None:
        self.chance = random.Random(seed)
        self.grid = grid
        self.now = NOON + timedelta(seconds=self.chance.random() * 60)
        self.instances = [Known() for _ in range(4)]
        self.holder = 0
        self.waiting: list[tuple[datetime, Baton]] = []
        self.runs: list[datetime] = []
        self.changes = 0
        self.seeds_due = self.now

    def step(self, deadly: float, changing: float) -> None:
        """Let the next thing happen."""
        self.waiting.sort(key=lambda each: each[0])
        if not self.waiting or self.seeds_due < self.waiting[0][0]:
            seed = Baton(self.grid.definition, None)
            self.waiting += [(self.seeds_due, seed)] * len(self.instances)
            self.seeds_due += timedelta(seconds=periodic.SEED_EVERY)
            return
        if self.chance.random() < changing:
            self._elect()
        self._handle(*self.waiting[0], deadly)

    def _elect(self) -> None:
        self.changes += 1
        self.holder = self.chance.randrange(len(self.instances))
        self.instances[self.holder] = self.instances[self.holder].elected()

    def _handle(self, arrival: datetime, baton: Baton, deadly: float) -> None:
        self.now = max(self.now, arrival)
        known = self.instances[self.holder]
        step = known.decide(self.grid, baton, self.now)
        acts: list[Callable[[], Any]] = []
        if step.run is not None:
            acts.append(partial(self.runs.append, step.run))
        if step.due is not None:
            back = min(step.due, self.now + timedelta(seconds=periodic.WAIT_AT_MOST))
            again = (back, Baton(self.grid.definition, step.due))
            acts.append(partial(self.waiting.append, again))
        acts.append(partial(self.waiting.remove, (arrival, baton)))
        for act in acts:
            if self.chance.random() < deadly:
                self.instances[self.holder] = Known()
                return self._elect()
            act()
        self.instances[self.holder] = known.noted(step)


@pytest.mark.parametrize("every", [60, 7 * 3600])
@pytest.mark.parametrize("seed", range(30))
def test_no_due_time_is_left_out_and_all_batons_merge(seed: int, every: float) -> None:
    """However often the holder dies or changes, and at which moment."""
    # Given
    world = World(seed, Grid.of(every, None, None))
    # When
    for _ in range(2000):
        world.step(deadly=0.02, changing=0.05)
    for _ in range(2000):
        world.step(deadly=0.0, changing=0.0)
    # Then
    runs = sorted(set(world.runs))
    assert [runs[0] + number * timedelta(seconds=every) for number in range(len(runs))] == runs
    assert 0 < len(world.runs) - len(runs) <= world.changes
    batons = [baton for _arrival, baton in world.waiting if baton.due is not None]
    assert 1 == len(batons)


def test_what_others_have_sent_on_is_not_taken_for_lost() -> None:
    """Who was the holder before, and becomes it again, does not repeat what others have run."""
    known = Known(run=NOON, due=NOON + MINUTE).elected()
    later = NOON + timedelta(hours=1)
    assert Step(due=later + MINUTE) == known.decide(GRID, SEED, later)
    assert DROP == known.decide(GRID, Baton(MINE, NOON), later)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"definition": 7},
        {"definition": "x", "due": 7},
        {"definition": "x", "due": "noon"},
        {"definition": "x", "due": "2026-01-01T00:00:00"},
    ],
)
def test_what_is_no_baton_is_refused(content: Any) -> None:
    """It comes from somebody else."""
    with pytest.raises(DecodeError):
        Baton.of(content)


def test_a_baton_travels() -> None:
    """What is written is what is read."""
    for baton in (SEED, Baton(MINE, NOON)):
        assert baton == Baton.of(baton.content())


# ------------------------------------------------------------------------- declaring


def test_jobs_are_named_after_their_methods_and_inherited() -> None:
    """And a subclass may change one."""

    class Base(PeriodicJobs):
        @Periodic(every=60)
        def one(self, due: datetime) -> None: ...

        @Periodic("second", every=60)
        def two(self, due: datetime) -> None: ...

    class Derived(Base):
        @Periodic(every=30)
        def one(self, due: datetime) -> None: ...

        def two(self, due: datetime) -> None: ...

    assert {"one": Job("one", GRID), "second": Job("second", GRID)} == jobs_of(Base)
    half = Grid.of(30, None, None)
    assert {"one": Job("one", half), "second": Job("second", GRID)} == jobs_of(Derived)
    assert {} == jobs_of(MessageProcessor)


def test_two_jobs_of_the_same_name_are_refused(broker_url: str) -> None:
    """They would take each other's baton."""

    class Twins(PeriodicJobs):
        @Periodic("same", every=60)
        def one(self, due: datetime) -> None: ...

        @Periodic("same", every=30)
        def two(self, due: datetime) -> None: ...

    with pytest.raises(ConfigurationError, match="same"):
        Twins({"name": "twins"}, [])


def test_a_component_with_jobs_needs_a_name(broker_url: str) -> None:
    """By which its instances find each other."""

    class Nameless(PeriodicJobs):
        @Periodic(every=60)
        def job(self, due: datetime) -> None: ...

    with pytest.raises(ConfigurationError, match="name"):
        Nameless({}, [])


# --------------------------------------------------------------------------- running


def run_until(component: MessageProcessor, condition: Callable[[], Any]) -> None:
    """Run a component until a condition holds."""
    scheduler = MicroScheduler()
    scheduler.add_microthread(component)
    thread = threading.Thread(target=lambda: collections.deque(scheduler.main(), maxlen=0))
    thread.start()
    try:
        wait_until(condition, 60.0)
    finally:
        component.stop_consuming()
        scheduler.exit()
        thread.join()


def test_all_kinds_of_handlers_are_run(broker_url: str) -> None:
    """Plain, generator, coroutine and threaded, each with its due time."""
    seen = collections.defaultdict[str, list[datetime]](list)

    class Kinds(PeriodicJobs, GenericApplication):
        @Periodic(every=1)
        def plain(self, due: datetime) -> None:
            seen["plain"].append(due)

        @Periodic(every=1)
        def generator(self, due: datetime) -> Generator[Any, Any, None]:
            yield sleep(0.01)
            seen["generator"].append(due)

        @Periodic(every=1)
        async def coroutine(self, due: datetime) -> None:
            await asyncio.sleep(0.01)
            seen["coroutine"].append(due)

        @Periodic(every=1, threaded=True)
        def threaded(self, due: datetime) -> None:
            seen["threaded"].append(due)

    component = Kinds(Fingerprint("kinds").as_dict())
    kinds = ("plain", "generator", "coroutine", "threaded")
    run_until(component, lambda: all(len(seen[kind]) >= 2 for kind in kinds))
    for kind in kinds:
        runs = seen[kind]
        assert [runs[0] + number * SECOND for number in range(len(runs))] == runs


def test_a_run_that_fails_is_tried_again_and_does_not_end_the_job(broker_url: str) -> None:
    """Retries are those of other messages; the next run is due as if nothing was."""
    seen = list[tuple[datetime, int]]()

    class Failing(PeriodicJobs):
        @Periodic(every=1)
        def job(self, due: datetime) -> None:
            seen.append((due, self.delivery.attempt))
            if seen[0] == (due, 1) == seen[-1]:
                raise RuntimeError("the first time")

    component = Failing({"name": "failing"}, [])
    run_until(component, lambda: len({due for due, _ in seen}) >= 3 and len(seen) >= 4)
    first = seen[0][0]
    assert {(first, 1), (first, 2), (first + SECOND, 1), (first + 2 * SECOND, 1)} <= set(seen)


def test_a_lost_baton_is_replaced(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of the instances find out."""
    # Given
    monkeypatch.setattr(periodic, "SEED_EVERY", 0.5)
    monkeypatch.setattr(periodic, "LOST_AFTER", 1.0)
    seen = list[datetime]()

    class Loser(PeriodicJobs):
        @Periodic(every=3)
        def job(self, due: datetime) -> None:
            seen.append(due)

    component = Loser({"name": "loser"}, [])

    def lose() -> bool:
        with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
            channel = connection.channel()
            levels = [f"postage-delay-{level:02}" for level in range(5)]
            return any(channel.queue_purge(level).method.message_count for level in levels)

    # When
    def lost_and_found() -> bool:
        nonlocal is_lost
        if not is_lost and component._chains["job"].known.due is not None:
            is_lost = lose()
        return is_lost and len(seen) >= 2

    is_lost = False
    run_until(component, lost_and_found)
    # Then
    assert sorted(set(seen)) == seen


def test_foreign_batons_do_not_harm(broker_url: str) -> None:
    """Nonsense is parked, and the job goes on."""
    seen = list[datetime]()

    class Victim(PeriodicJobs):
        @Periodic(every=1)
        def job(self, due: datetime) -> None:
            seen.append(due)

    component = Victim({"name": "victim"}, [])
    with GenericProducer() as producer:
        for body in ({"name": "job", "content": {}}, {"name": "other", "content": {}}):
            envelope = {"type": "periodic-baton", "category": "message", "version": "2"}
            producer.forward(
                {**envelope, **body, "fingerprint": {}, "_reserved": {}},
                _queue="postage-periodic-victim.job",
            )
    queue = "postage-periodic-victim.job"
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        parked = error_queue(f"{queue}.error")
        channel.queue_declare(parked.name, durable=True, arguments=dict(parked.arguments))

        def parked() -> int:
            declared = channel.queue_declare(f"{queue}.error", passive=True)
            return int(declared.method.message_count)

        run_until(component, lambda: len(seen) >= 2 and parked() == 2)


# ---------------------------------------------------------------- several processes


def runs_of(*programs: Program) -> list[tuple[datetime, str]]:
    """Return the due time and the message id of all runs, in the order of due times."""
    lines = [line.split() for program in programs for line in list(program.stdout)]
    words = [line for line in lines if line[0] == "run" and len(line) == 3]
    return sorted((datetime.fromisoformat(due), id) for _run, due, id in words)


def assert_without_gap(runs: list[tuple[datetime, str]], every: timedelta) -> None:
    """Each due time has its run, and doubles have the same message id."""
    due = sorted({due for due, _id in runs})
    assert [due[0] + number * every for number in range(len(due))] == due
    assert len(due) == len({id for _due, id in runs})


def test_each_due_time_is_run_by_one_of_several_instances(broker_url: str) -> None:
    """Without doubles, as long as nobody dies."""
    with Program([PROGRAM, "clock", "1"]) as one, Program([PROGRAM, "clock", "1"]) as two:
        wait_until(lambda: len(runs_of(one, two)) >= 5, 60.0)
        runs = runs_of(one, two)
    assert_without_gap(runs, SECOND)
    assert len(set(runs)) == len(runs)


def test_the_death_of_the_holder_leaves_no_due_time_out(broker_url: str) -> None:
    """It is killed again and again; another one takes over."""
    with Program([PROGRAM, "clock", "1"]) as one, Program([PROGRAM, "clock", "1"]) as two:
        programs = [one, two]
        for _ in range(3):
            before = len(runs_of(*programs))
            wait_until(lambda before=before: len(runs_of(*programs)) >= before + 2, 60.0)
            living = [program for program in programs if program.is_running]
            holder = max(living, key=lambda program: max(runs_of(program), default=(NOON, "")))
            holder.kill()
            programs.append(Program([PROGRAM, "clock", "1"]))
        try:
            before = len(runs_of(*programs))
            wait_until(lambda: len(runs_of(*programs)) >= before + 3, 60.0)
            runs = runs_of(*programs)
        finally:
            for program in programs[2:]:
                program.__exit__(None, None, None)
    assert_without_gap(runs, SECOND)
    assert len(runs) - len(set(runs)) <= 3


def test_what_was_missed_while_nobody_lived_is_run_once(broker_url: str) -> None:
    """The first due time that was missed; then the job goes on at its grid."""
    # Given
    with Program([PROGRAM, "clock", "2"]) as one:
        wait_until(lambda: runs_of(one), 60.0)
        # In the middle between two runs: all of the last one is done with.
        wait_until(lambda: datetime.now(timezone.utc) > runs_of(one)[-1][0] + SECOND, 60.0)
        one.kill()
        one.wait()
        last = runs_of(one)[-1][0]
    # When
    wait_until(lambda: datetime.now(timezone.utc) > last + timedelta(seconds=7), 60.0)
    with Program([PROGRAM, "clock", "2"]) as two:
        wait_until(lambda: len(runs_of(two)) >= 3, 60.0)
        caught_up, *rest = [due for due, _id in runs_of(two)]
    # Then
    assert last + timedelta(seconds=2) == caught_up
    assert rest[0] > last + timedelta(seconds=7)
    assert [rest[0] + number * timedelta(seconds=2) for number in range(len(rest))] == rest


def test_another_interval_is_in_force_after_a_restart(broker_url: str) -> None:
    """The baton of the old code is dropped."""
    with Program([PROGRAM, "clock", "2"]) as old:
        wait_until(lambda: runs_of(old), 60.0)
        old.terminate()
        old.wait()
        last = runs_of(old)[-1][0]
    with Program([PROGRAM, "clock", "3"]) as new:
        wait_until(lambda: len(runs_of(new)) >= 3, 60.0)
        runs = runs_of(new)
    assert_without_gap(runs, timedelta(seconds=3))
    assert len(set(runs)) == len(runs)
    assert runs[0][0] > last


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_job_outlives_the_broker(node: Node, broker_url: str, how: str) -> None:
    """What was due meanwhile is run once, and the job goes on."""
    with Program([PROGRAM, "clock", "1"]) as one, Program([PROGRAM, "clock", "1"]) as two:
        wait_until(lambda: len(runs_of(one, two)) >= 2, 60.0)
        getattr(node, how)()
        node.start()
        started = datetime.now(timezone.utc)

        def is_back() -> bool:
            """While the broker recovers, runs may be late, and one for several due times."""
            last = sorted({due for due, _id in runs_of(one, two)})[-4:]
            return last[0] > started and last[-1] - last[0] == 3 * SECOND

        wait_until(is_back, 90.0)
        runs = runs_of(one, two)
    assert len({due for due, _id in runs}) == len({id for _due, id in runs})
    assert len(runs) - len(set(runs)) <= 2
