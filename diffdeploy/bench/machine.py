"""The machine of a run: processor, versions, load, and the rate of its matrix products."""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from diffdeploy import __version__
from diffdeploy.bench.timing import latency_ms
from diffdeploy.errors import UnavailableError
from diffdeploy.formats import Device, distributions
from diffdeploy.records import Record
from diffdeploy.versions import installed_versions

__all__ = ["Machine", "OtherLoad", "matmul_gflop_per_second", "set_up_torch"]

_MATMUL_SIZES = (512, 1024, 2048, 4096)
# Keeps the total at about a second, even on slow machines, since it is measured again after each size.
_LONGEST_MATMUL_MS = 250.0


def set_up_torch(device: Device, threads: int | None) -> None:
    """Set the number of CPU threads, before anything is exported: AOTInductor compiles it into the code.

    Raises:
        UnavailableError: this machine does not have the device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device is cuda, but torch finds no CUDA device here; use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)


class Machine(Record):
    """The machine and its software.

    Attributes:
        diffdeploy: version of diffdeploy.
        measured_at: start of the run, in universal time.
        platform: operating system.
        python: version of Python.
        cpu: model and instruction set.
        num_cpus: number of CPUs that this process may use.
        threads: number of threads of every candidate.
        device: ``cpu``, or the name of the CUDA device.
        gpu: clocks and power of the CUDA device before and right after the first matrix products; ``None`` if unknown.
        packages: versions of the packages that run the candidates.
        load_average: load average of the minute before the run.
        other_load: average number of cores that other processes kept busy during the measurement, which adds noise;
            ``None`` if it is unknown.
        matmul_gflop_per_second: highest rate of square matrix products in the dtype of the run, measured before the
            first size and after each one.
    """

    diffdeploy: str
    measured_at: str
    platform: str
    python: str
    cpu: str
    num_cpus: int
    threads: int
    device: str
    gpu: str | None = None
    packages: dict[str, str]
    load_average: float
    other_load: float | None = None
    matmul_gflop_per_second: float

    def columns(self) -> dict[str, Any]:
        """Fields for a table, with the version of each package in a column of its own, after the others."""
        fields = self.model_dump()
        packages = fields.pop("packages")
        return {**fields, **packages}

    @classmethod
    def current(cls, *, dtype: str, device: str, threads: int) -> "Machine":
        """Describe the machine of this process; takes a second for the matrix products."""
        import torch

        # Read before the matrix products below, which raise it.
        load_average = os.getloadavg()[0]
        before = _clocks_and_power() if device == "cuda" else None
        rate = matmul_gflop_per_second(dtype, device=device, threads=threads)
        return cls(
            diffdeploy=__version__,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            platform=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            cpu=f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
            # os.cpu_count would ignore limits of a container or of taskset.
            num_cpus=len(os.sched_getaffinity(0)),
            threads=threads,
            device=torch.cuda.get_device_name() if device == "cuda" else device,
            gpu=None if before is None else f"{before} before, {_clocks_and_power()} after matrix products",
            packages=installed_versions(distributions()),
            load_average=round(load_average, 2),
            matmul_gflop_per_second=round(rate, 1),
        )

    def updated(self, other_load: float, matmul_gflop_per_second: float) -> "Machine":
        """Update the load, and the highest rate so far: other load can only lower a rate."""
        best = max(self.matmul_gflop_per_second, round(matmul_gflop_per_second, 1))
        return self.model_copy(update={"other_load": other_load, "matmul_gflop_per_second": best})


class OtherLoad:
    """Number of cores that other processes have kept busy since this object was created (Linux; man 5 proc_stat)."""

    def __init__(self) -> None:
        self._start = self._now()

    def __call__(self) -> float:
        """Average so far."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        # The kernel counts the work of all cores in ticks of 10 ms, so it may lag behind this process's own count.
        return round(max(0.0, busy - own) / wall, 2)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of elapsed time, of work on all cores, and of work of this process."""
        # Waiting is not work; the columns after these count guests, which `user` already includes.
        user, nice, system, _idle, _wait, *other = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        busy = (user + nice + system + sum(other)) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()


def _clocks_and_power() -> str | None:
    """Clocks and power of torch's current CUDA device, as reported by its driver; no setting is changed."""
    import torch

    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit"
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = ["nvidia-smi", device, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        sm, most, memory, power, limit = said.strip().split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return f"{sm} of {most} MHz, memory {memory} MHz, {power} of {limit} W"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def matmul_gflop_per_second(dtype: str, *, device: str, threads: int) -> float:
    """Highest rate among products of square matrices, 512 to 4096 wide, up to about a quarter of a second each."""
    import torch

    best, longest_ms = 0.0, 0.0
    for size in _MATMUL_SIZES:
        if 8 * longest_ms > _LONGEST_MATMUL_MS:  # twice the size takes eight times as long
            break
        left, right = (torch.ones(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
        longest_ms = latency_ms(partial(torch.matmul, left, right), device=device, threads=threads)
        # One addition and one multiplication per product; 10^6 operations per ms are 10^9 per second.
        best = max(best, 2 * size**3 / longest_ms / 1e6)
    return best
