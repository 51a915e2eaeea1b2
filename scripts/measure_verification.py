"""Time and peak memory of ``diffdeploy verify`` on one block of D 1024 (h 8, d 64), and the artifact's own peak.

    python scripts/measure_verification.py [--formats onnx pt2] [--graphs plain cached] [--dtypes float32]

Peaks are those that the kernel records for the verifying process and for the one that runs the artifact (``VmHWM``).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch

from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionConfig, RopeConfig, lambda_init_at
from diffdeploy.exporters import ExportOptions, export_bundle

# Runs the code that is imported here, even if no command is installed.
COMMAND = [sys.executable, "-m", "diffdeploy", "verify"]


def block() -> Checkpoint:
    lambda_init = lambda_init_at(3)
    config = DiffAttentionConfig(
        embed_dim=1024,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        lambda_init=lambda_init,
        output_scale=1 - lambda_init,
        rope=RopeConfig(style="interleaved", theta=1e4),
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if name.startswith("lambda") else config.embed_dim**-0.5)
        for name, shape in config.weight_shapes().items()
    }
    weights["subln.weight"] = torch.ones(config.value_dim)
    return Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))


def peak_mib(process: int) -> float:
    """Peak memory of a process so far; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def measure(bundle: Path, cases: str) -> tuple[float, float, float]:
    """Seconds, and MiB of the verifying process and of the artifact's process."""
    started, own, artifact = time.perf_counter(), 0.0, 0.0
    process = subprocess.Popen(
        [*COMMAND, str(bundle), "--cases", cases], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None:
        own = max(own, peak_mib(process.pid))
        # The artifact's process ends early, so its peak must be read repeatedly.
        artifact = max([artifact, *map(peak_mib, children(process.pid))])
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        # A failed verification ends early, so its time would be too short.
        raise SystemExit(process.communicate()[1].decode())
    return seconds, own, artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", default=["onnx", "pt2", "aoti"])
    parser.add_argument("--graphs", nargs="+", default=["plain", "cached"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--cases", nargs="+", default=["quick", "full"])
    arguments = parser.parse_args()
    row = "{:<8} {:<8} {:<9} {:<6} {:>8} {:>11} {:>11} {:>6}"
    print(row.format("format", "graph", "dtype", "cases", "seconds", "verify MiB", "run MiB", "ratio"))
    for name, graph, dtype in product(arguments.formats, arguments.graphs, arguments.dtypes):
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            # Exported without verification, which is measured in a separate process.
            export_bundle(block(), bundle, ExportOptions(format=name, graph=graph, dtype=dtype), verify=False)
            for cases in arguments.cases:
                seconds, own, artifact = measure(bundle, cases)
                figures = (f"{seconds:.1f}", f"{own:.0f}", f"{artifact:.0f}", f"{own / artifact:.1f}")
                print(row.format(name, graph, dtype, cases, *figures), flush=True)


if __name__ == "__main__":
    main()
