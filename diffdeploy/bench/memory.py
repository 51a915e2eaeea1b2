"""Peak memory of one candidate, in a process that runs nothing else.

On a CPU, it is the largest resident size during a call minus the resident size before the candidate was loaded, when
the inputs and all libraries were already in memory. On CUDA, it is the growth of the peak of torch's allocator.
"""

import gc
import resource
from collections.abc import Callable
from pathlib import Path

from diffdeploy.bench.candidate_run import Run
from diffdeploy.processes import return_freed_memory

__all__ = ["peak_bytes"]

# Resets the peak resident size (man 5 proc_pid_clear_refs).
_CLEAR_PEAK = "5"


def peak_bytes(
    open_run: Callable[[], Run], call: Callable[[Run], object], warm_up: Callable[[Run], object], *, device: str
) -> int:
    """Load a candidate and call it; return the memory that it takes while it runs, weights included.

    It must have been loaded and called in this process before, so that libraries are not counted.

    Args:
        open_run: function that loads the candidate.
        call: function that runs it on the inputs to measure.
        warm_up: function that runs it on small inputs.
        device: ``cpu`` or ``cuda``.
    """
    import torch

    cuda = device == "cuda"
    _release()
    before = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    run = open_run()
    warm_up(run)
    _release()
    # Temporary memory of loading and of a first call does not count, so the peak is reset after them.
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    call(run)
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_resident_bytes()
    return peak - before


def _release() -> None:
    """Return unused memory to the system, so that it does not count as resident."""
    gc.collect()
    return_freed_memory()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
