"""How long a bundle takes from nothing to its first result, in a process that has loaded nothing before.

``python -m diffdeploy.bench.startup BUNDLE [DEVICE]`` prints the figures as one line of JSON.
"""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import diffdeploy
from diffdeploy.errors import ExportError

__all__ = ["Startup", "measure_startup"]


class Startup(BaseModel):
    """Seconds, each after the one before.

    Attributes:
        import_seconds: of the backend's package.
        load_seconds: of `diffdeploy.load`, digests included.
        first_call_seconds: of the first call, with the inputs of `Runtime.warmup`.
    """

    model_config = ConfigDict(frozen=True)

    import_seconds: float
    load_seconds: float
    first_call_seconds: float


def measure_startup(bundle: Path, device: str | None = None) -> Startup:
    """Load a bundle in a fresh process and call it once.

    Raises:
        ExportError: it does not load or run.
    """
    root = str(Path(diffdeploy.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(bundle.absolute()), *([] if device is None else [device])],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ExportError(f"{bundle} does not start: {reason}")
    return Startup.model_validate_json(done.stdout.splitlines()[-1])


def _main(bundle: str, device: str | None = None) -> None:
    from diffdeploy.bundle import open_bundle

    package_of = {"onnx": "onnxruntime"}
    moments = [time.perf_counter()]
    __import__(package_of.get(open_bundle(bundle).manifest.format, "torch"))
    moments.append(time.perf_counter())
    runtime = diffdeploy.load(bundle, device=device)
    moments.append(time.perf_counter())
    runtime.warmup()
    moments.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(moments)]
    sys.stdout.write(json.dumps(dict(zip(Startup.model_fields, seconds, strict=True))) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
