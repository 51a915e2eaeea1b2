"""Time until the first result of a bundle, in a process that has loaded nothing before.

``python -m diffdeploy.bench.startup BUNDLE [DEVICE]`` prints the figures as one line of JSON.
"""

import json
import sys
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from diffdeploy.errors import ExportError
from diffdeploy.processes import WorkerProcess
from diffdeploy.records import Record

__all__ = ["Startup", "measure_startup"]


class Startup(Record):
    """Durations of consecutive steps in seconds.

    Attributes:
        import_seconds: import of the backend's package.
        load_seconds: `diffdeploy.load`, including the digests.
        first_call_seconds: the first call, with the inputs of `Runtime.warmup`.
    """

    import_seconds: float
    load_seconds: float
    first_call_seconds: float


def measure_startup(bundle: Path, device: str | None = None) -> Startup:
    """Load a bundle in a fresh process and call it once.

    Raises:
        ExportError: the bundle does not load or run.
    """
    arguments = [str(bundle.absolute()), *([] if device is None else [device])]
    with WorkerProcess(__name__, arguments) as process:
        said = process.stdout.read().splitlines()
        if process.wait():
            raise ExportError(f"{bundle} does not start: the process {process.obituary()}")
    # Only the last line counts, since backends may print before it.
    return Startup.model_validate_json(said[-1])


def _main(bundle: str, device: str | None = None) -> None:
    from diffdeploy.bundle import open_bundle
    from diffdeploy.formats import RunOptions, require_format
    from diffdeploy.runtime import open_runtime

    package = require_format(open_bundle(bundle).manifest.format).package
    moments = [time.perf_counter()]
    # Timed separately, since it is the same for all bundles of a format.
    import_module(package)
    moments.append(time.perf_counter())
    runtime = open_runtime(bundle, RunOptions(device=device, trust=True))
    moments.append(time.perf_counter())
    runtime.warmup()
    moments.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(moments)]
    sys.stdout.write(json.dumps(dict(zip(Startup.model_fields, seconds, strict=True))) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
