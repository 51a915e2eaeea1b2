"""Peak memory of one candidate, in a process that runs nothing else.

On a CPU it is the largest resident size during a call, over the resident size before the candidate was loaded, when the
inputs and all libraries were there already. On CUDA it is the peak of torch's allocator, over what it held before.
"""

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

from diffdeploy.bench.candidate_run import Run

__all__ = ["peak_bytes"]

# Resets the peak resident size (man 5 proc_pid_clear_refs).
_CLEAR_PEAK = "5"


def peak_bytes(
    open_run: Callable[[], Run], call: Callable[[Run], object], warm_up: Callable[[Run], object], *, device: str
) -> int:
    """Load a candidate and call it; what it takes while it runs, weights included.

    It has to have been loaded and called in this process before, so that libraries are not counted.

    Args:
        open_run: loads the candidate.
        call: runs it on the inputs that count.
        warm_up: runs it on small inputs.
        device: ``cpu`` or ``cuda``.
    """
    import torch

    cuda = device == "cuda"
    _release()
    before = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    run = open_run()
    warm_up(run)
    _release()
    # What loading and a first call take for a moment is no part of a call: the peak starts behind them.
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    call(run)
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_resident_bytes()
    return peak - before


def _release() -> None:
    """Give freed memory back to the system, where the C library can, so that none of it counts as resident."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
