"""Latencies, round by round: in each round every candidate is timed once, in a new random order.

Slowdowns of the machine then affect all candidates alike, and the previous candidate, which leaves traces in caches and
in threads that are still spinning, is a different one each time.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch.utils.benchmark import Timer

from diffdeploy.exclusive import without_warnings

__all__ = ["as_cuda_graph", "latency_ms", "num_rounds", "rounds", "seconds_per_call"]

Call = Callable[[], object]

# Long enough for the threads of the previous candidate to fall asleep: they spin for a few milliseconds.
_SECONDS_PER_SAMPLE = 0.05
_SECONDS_PER_SIZE = 12.0
# A confidence interval needs at least six rounds; with odd numbers, the median is a measured round.
_LEAST_ROUNDS, _MOST_ROUNDS = 9, 31


def latency_ms(call: Call, *, device: str, threads: int) -> float:
    """Take one sample: the median of a few calls on a CPU, or their mean on CUDA; the first calls do not count."""
    return _cuda_ms(call) if device == "cuda" else _cpu_ms(call, threads)


def _cpu_ms(call: Call, threads: int) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return float(timer.blocked_autorange(min_run_time=_SECONDS_PER_SAMPLE).median) * 1e3


def _cuda_ms(call: Call) -> float:
    import torch

    # The call that `seconds_per_call` makes is the first one, which does not count.
    count = max(3, int(_SECONDS_PER_SAMPLE / seconds_per_call(call, device="cuda")))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # Events enclose all calls, since events around each would time the launches of short kernels, not the kernels.
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed / count


def as_cuda_graph(call: Call) -> Call | None:
    """Capture a call as a CUDA graph, to time kernels that take longer to launch than to run; ``None`` if impossible.

    A call that waits for the device, or that submits work to a stream other than the current one, cannot be captured.
    """
    import torch

    home, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(home)
    try:
        with torch.cuda.stream(stream):
            call()  # the first call may allocate and compile
            # Checked beforehand, since an aborted capture leaves torch's allocator in capture mode.
            with _no_waiting():
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.set_stream(home)
        torch.cuda.synchronize()
        return None

    def replay(_kept: Call = call) -> None:
        graph.replay()

    return replay  # the graph reads tensors of the call, which it does not keep alive


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError where torch would wait for the device."""
    import torch

    before = torch.cuda.get_sync_debug_mode()
    with without_warnings():  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def seconds_per_call(call: Call, *, device: str) -> float:
    """A rough latency from a single call, for planning."""
    import torch

    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def num_rounds(seconds: Mapping[str, float]) -> tuple[int, float]:
    """Number of rounds, 9 to 31, that fit into the time allowed for one size, and the duration of one round.

    Args:
        seconds: duration of a call of each candidate.
    """
    # One call before the sample does not count, and a sample of a slow candidate is one call. For a fast one, the timer
    # takes another fifth of the time to find the number of calls in a sample.
    round_seconds = sum(max(2 * each, 1.2 * _SECONDS_PER_SAMPLE) for each in seconds.values())
    return min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(_SECONDS_PER_SIZE / round_seconds))), round_seconds


def rounds(
    calls: Mapping[str, Call], count: int, *, device: str, threads: int, seed: int
) -> Iterator[tuple[int, str, float]]:
    """Time all candidates, which take turns, and yield round, name and milliseconds."""
    # Seeded, so that the command in the report measures in the same order again.
    order, generator = list(calls), random.Random(seed)
    for number in range(count):
        generator.shuffle(order)
        for name in order:
            yield number, name, latency_ms(calls[name], device=device, threads=threads)
