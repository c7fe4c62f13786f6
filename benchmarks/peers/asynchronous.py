# SPDX-License-Identifier: MIT
"""Work for the peers that run on asyncio. It needs nothing but the standard library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from benchmarks.envelope import numbers
from benchmarks.job import WARM_UP, Job, check, latencies
from benchmarks.measuring import Sample, Stopwatch


async def call(job: Job, function: Callable[[int], Awaitable[int]]) -> Sample:
    """Make the calls of a job, as many at a time as it says."""
    if job.in_flight == 1:
        return await _one_by_one(job, function)

    async def checked(number: int) -> None:
        check(number, await function(number))

    await checked(0)  # some connect with the first call
    return await measure(job, checked, "call")


async def measure(job: Job, work: Callable[[int], Awaitable[Any]], unit: str) -> Sample:
    """Do work for each number of a job, as much at a time as it says."""
    left = iter(numbers(job.count))
    watch = Stopwatch()
    watch.start()
    await asyncio.gather(*(_work(work, left) for _ in range(job.in_flight)))
    watch.stop()
    return watch.sample(job.count, unit)


async def _work(work: Callable[[int], Awaitable[Any]], left: Iterable[int]) -> None:
    for number in left:
        await work(number)


async def _one_by_one(job: Job, function: Callable[[int], Awaitable[int]]) -> Sample:
    milliseconds = []
    for number in numbers(WARM_UP + job.count):
        started = time.perf_counter()
        result = await function(number)
        milliseconds.append((time.perf_counter() - started) * 1000)
        check(number, result)
    return latencies(milliseconds[WARM_UP:])
