# SPDX-License-Identifier: MIT
"""Cases are repeated in turn, and compared within each round."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.measuring import (
    Beside,
    Case,
    Result,
    Sample,
    Target,
    Workload,
    cost_first,
    percentile,
    run,
)


def measured(*samples: float | None, target: Target | None = None) -> Result:
    """Return the result of a case that is compared with none; None is a round that failed."""
    case = Case("mine", lambda _url: {}, target=target)
    return Result(case, [None if each is None else {"messages/s": each} for each in samples])


def in_order(log: list[str], name: str) -> Callable[[str], Sample]:
    """Return the work of a case that logs its name."""

    def measure(_url: str) -> Sample:
        log.append(name)
        return {"messages/s": 1.0}

    return measure


def test_a_ratio_is_of_the_same_round() -> None:
    """A ratio compares two samples of one round, and no others."""
    mine = measured(10.0, 40.0)
    mine.base = measured(20.0, 20.0)
    ratio = mine.ratio()
    assert ratio is not None
    assert [0.5, 2.0] == list(ratio.values)


def test_a_round_in_which_one_of_the_two_failed_is_left_out_of_the_ratio() -> None:
    """A ratio needs both samples of a round."""
    mine = measured(10.0, None, 30.0)
    mine.base = measured(20.0, 20.0, None)
    ratio = mine.ratio()
    assert ratio is not None
    assert [0.5] == list(ratio.values)
    assert 1 == mine.failures


def test_a_target_without_a_base_is_for_the_figure_itself() -> None:
    """A case that is compared with none is judged by its first figure."""
    assert measured(44.0, target=Target(45, is_maximum=True)).is_met() is True
    assert measured(46.0, target=Target(45, is_maximum=True)).is_met() is False


def test_a_case_that_always_failed_misses_its_target() -> None:
    """Nothing measured is nothing met."""
    assert measured(None, target=Target(45)).is_met() is False


def test_a_case_without_a_target_is_not_judged() -> None:
    """Without a target, there is no verdict."""
    assert measured(46.0).is_met() is None


def test_every_second_round_is_reversed() -> None:
    """A steady drift favours no case."""
    log: list[str] = []
    cases = [Case(name, in_order(log, name)) for name in ("a", "b")]
    run(Workload("work", "Work", cases), "", 2, lambda _text: None)
    assert ["a", "b", "b", "a"] == log


def test_a_workload_may_want_fewer_rounds() -> None:
    """Work that takes long is repeated less often than the rest."""
    log: list[str] = []
    workload = Workload("work", "Work", [Case("a", in_order(log, "a"))], rounds=2)
    run(workload, "", 5, lambda _text: None)
    assert ["a", "a"] == log


def test_a_case_that_fails_leaves_the_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A failure is told of, and the other cases are measured."""

    def fail(_url: str) -> Sample:
        raise RuntimeError("no such peer")

    cases = [Case("bad", fail), Case("good", lambda _url: {"messages/s": 7.0}, "bad")]
    bad, good = run(Workload("work", "Work", cases), "", 1, lambda _text: None)
    assert [None] == bad.samples
    assert [{"messages/s": 7.0}] == good.samples
    assert good.ratio() is None
    assert "no such peer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figure", "best", "ratio"), [("messages/s", "fast", 2.0), ("p50 ms", "slow", 4.0)]
)
def test_a_case_is_compared_with_the_best_of_others(figure: str, best: str, ratio: float) -> None:
    """The most is the best of rates, and the least of times."""
    cases = [
        Case("mine", lambda _url: {figure: 40.0}, also=[Beside(["slow", "fast"], Target(3))]),
        Case("slow", lambda _url: {figure: 10.0}),
        Case("fast", lambda _url: {figure: 20.0}),
    ]
    results = run(Workload("work", "Work", cases), "", 1, lambda _text: None)
    assert ["mine", f"mine, beside {best}", "slow", "fast"] == [each.case.name for each in results]
    found = results[1].ratio()
    assert found is not None
    assert ratio == found.median
    assert (ratio >= 3) == results[1].is_met()


def test_a_case_is_not_compared_with_others_that_failed() -> None:
    """Where all have failed, the comparison is left out."""

    def fail(_url: str) -> Sample:
        raise RuntimeError("no such peer")

    mine = Case("mine", lambda _url: {"messages/s": 40.0}, also=[Beside(["theirs"], Target(3))])
    workload = Workload("work", "Work", [mine, Case("theirs", fail)])
    results = run(workload, "", 1, lambda _text: None)
    assert ["mine", "theirs"] == [each.case.name for each in results]


def test_the_essence_is_what_has_a_target_and_what_that_is_compared_with() -> None:
    """The quick form measures nothing that no target needs."""
    work = in_order([], "")
    cases = [
        Case("base", work),
        Case("of no interest", work, "base"),
        Case("judged", work, "base", Target(1)),
    ]
    essence = Workload("work", "Work", cases).essence()
    assert ["base", "judged"] == [case.name for case in essence.cases]


def test_cases_may_be_compared_by_their_processor_time() -> None:
    """The cost comes first, and the other figures keep their order."""
    sample = cost_first({"messages/s": 1.0, "CPU us/message": 2.0, "broker us/message": 3.0})
    assert ["CPU us/message", "messages/s", "broker us/message"] == list(sample)


@pytest.mark.parametrize(("percent", "expected"), [(50, 51), (99, 100), (100, 100)])
def test_a_percentile_is_one_of_the_values(percent: int, expected: float) -> None:
    """A percentile is the value that so many percent do not exceed."""
    assert expected == percentile(list(range(1, 101)), percent)
