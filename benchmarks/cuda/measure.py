"""Times of calls that take turns: medians of CUDA graph replays, or of wall-clock rounds on the CPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

GRAPH_SECONDS = 1e-3
"""A graph holds so many calls that it runs about this long: then what an event costs does not count."""
GRAPH_NODES = 1024
"""Most calls in one graph."""


class DeviceLost(RuntimeError):
    """The CUDA context is beyond repair (an illegal access, say): only a new process can go on."""


@dataclass
class Timing:
    """Median microseconds of one call; ``spread``: distance of the quartiles over the median; ``best``: the least."""

    us: float = math.nan
    spread: float = math.nan
    best: float = math.nan
    note: str = ""  # why there is no time, or what is odd about it

    @property
    def ok(self) -> bool:
        return not math.isnan(self.us)


@dataclass
class Runner:
    """One contender, warm: ``run`` makes ``count`` calls, which takes about ``seconds``."""

    run: Call
    count: int
    seconds: float
    note: str = ""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:100]


def release(device: str) -> None:
    """Gives memory back between cases."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _recover(device: str, error: BaseException) -> str:
    """What is written in place of a time; raises DeviceLost where nothing can be timed any more."""
    message = first_line(error)
    try:
        synchronize(device)
        release(device)
    except RuntimeError as lost:
        raise DeviceLost(message) from lost
    return message


def prepare(calls: Sequence[Call], device: str) -> Runner:
    """Runs every call once, then captures as many rounds of all of them as make a graph worth timing."""

    def once() -> None:
        for call in calls:
            call()

    once()
    synchronize(device)
    begin = time.perf_counter()
    once()
    synchronize(device)
    seconds = max(time.perf_counter() - begin, 1e-7)
    if device != "cuda":
        return Runner(once, len(calls), seconds)
    rounds = max(1, min(math.ceil(GRAPH_SECONDS / seconds), GRAPH_NODES // len(calls)))

    def repeat() -> None:
        for _ in range(rounds):
            once()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeat()
    except Exception as error:
        note = _recover(device, error)
        return Runner(repeat, rounds * len(calls), rounds * seconds, f"timed without a graph ({note})")
    return Runner(graph.replay, rounds * len(calls), rounds * seconds)


def _sample_cuda(runners: Mapping[str, Runner], rounds: int) -> dict[str, list[float]]:
    """Microseconds of one call in every round. Nothing waits in between, so the GPU never idles."""
    events = []
    for _ in range(rounds):
        for name, runner in runners.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runner.run()
            end.record()
            events.append((name, start, end))
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for name, start, end in events:
        samples[name].append(start.elapsed_time(end) * 1e3 / runners[name].count)
    return samples


def _sample_cpu(runners: Mapping[str, Runner], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            begin = time.perf_counter()
            runner.run()
            samples[name].append((time.perf_counter() - begin) * 1e6 / runner.count)
    return samples


def race(contenders: Mapping[str, Sequence[Call]], device: str, seconds: float) -> dict[str, Timing]:
    """Times all contenders in turns for about ``seconds`` in all, at least 5 rounds (2 on the CPU).

    A contender that fails has its error for a time, and the others go on.

    Args:
        contenders: by name, calls over different inputs that are rotated.
        device: ``"cuda"`` or ``"cpu"``.

    Raises:
        DeviceLost: nothing on this device can be timed any more.
    """
    timings: dict[str, Timing] = {}
    runners: dict[str, Runner] = {}
    for name, calls in contenders.items():
        try:
            runners[name] = prepare(calls, device)
        except Exception as error:
            timings[name] = Timing(note=_recover(device, error))
    if not runners:
        return timings
    total = sum(r.seconds for r in runners.values())
    on_cuda = device == "cuda"
    rounds = min(max(int(seconds / total), 5 if on_cuda else 2), 200)
    sample = _sample_cuda if on_cuda else _sample_cpu
    try:
        sample(runners, 1)  # the first round may wait for the host
        samples = sample(runners, rounds)
    except Exception as error:
        note = _recover(device, error)
        return timings | {name: Timing(note=note) for name in runners}
    for name, times in samples.items():
        middle = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4)
        timings[name] = Timing(middle, (high - low) / middle, min(times), runners[name].note)
    return timings


def host_us(call: Call, device: str, calls: int = 50) -> float:
    """Microseconds of processor time the host needs to issue one call, the device not waited for."""
    call()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - begin
    synchronize(device)
    return seconds * 1e6 / calls
