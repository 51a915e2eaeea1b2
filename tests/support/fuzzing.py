"""Random inputs: a fixed sample along with the other tests, and new inputs in each run of ``make fuzz``."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hypothesis import HealthCheck, settings

# Number of inputs for each test; `make fuzz` sets it.
_DRAWS = int(os.environ.get("DIFFDEPLOY_FUZZ", "0"))
fuzzed = settings(
    max_examples=_DRAWS or 60,
    derandomize=not _DRAWS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
_SECONDS = 10


@contextmanager
def limited_time() -> Iterator[None]:
    """Fail if the ``with`` block takes longer than anybody would wait."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
