"""Time and peak extra memory of every implementation of the operator, as ratios to ``naive``.

    python scripts/measure_ops.py [--device cuda] [--lengths 128 512 2048 8192] [--dtypes float32 bfloat16]

For each size, all implementations take turns, round by round, so that drift affects all alike. The output lists
medians, and the number of counted operations per second (12 d per causal pair and head) as a share of the machine's
rate for matrix products, measured right before and after.
On a CPU, the extra memory of each is the growth of the peak resident size in a separate process.
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffdeploy.bench.machine import matmul_gflop_per_second
from diffdeploy.bench.operations import attention_flop
from diffdeploy.bench.plan import Size
from diffdeploy.bench.synthetic import random_checkpoint
from diffdeploy.errors import DiffDeployError
from diffdeploy.ops import Impl, diff_attention
from diffdeploy.ops.flash2 import Road, flash2
from diffdeploy.ops.request import Request

# Stream widths of published models, at a model width of 1024.
SHAPES = ((8, 64), (4, 128))
# Odd, so that the median is a measured round; above this length, one round takes tens of seconds.
_ROUNDS, _ROUNDS_WHEN_LONG, _LAST_QUICK_LENGTH = 15, 2, 2048
IMPLEMENTATIONS = [impl.value for impl in Impl if impl != Impl.AUTO]


def inputs(heads: int, width: int, length: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    shapes = [(1, 2 * heads, length, width), (1, 2 * heads, length, width), (1, heads, length, 2 * width)]
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return q, k, v, torch.tensor(0.4, device=device)


def timed(run: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # Many launches between two events, since launching a kernel takes longer than running it on a short sequence.
    repeats = 10
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed / repeats


def candidates(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every implementation that runs here, by name; FlashAttention-2 with each method of making widths equal."""
    runs: dict[str, Callable[[], Tensor]] = {
        impl: partial(diff_attention, q, k, v, lam, causal=True, impl=impl) for impl in [*IMPLEMENTATIONS, "auto"]
    }
    for road in Road:
        runs[f"flash2 {road}"] = partial(flash2, Request.of(q, k, v, lam, causal=True), road=road)
    able = {}
    for name, run in runs.items():
        try:
            run()
        # If a package, a kernel or memory is lacking, the others are still measured.
        except (DiffDeployError, ImportError, RuntimeError, torch.OutOfMemoryError) as error:
            print(f"{name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            able[name] = run
    return able


def latencies_ms(heads: int, width: int, length: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    runs = candidates(*inputs(heads, width, length, dtype, device))
    rounds = _ROUNDS if length <= _LAST_QUICK_LENGTH else _ROUNDS_WHEN_LONG
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)  # earlier candidates leave traces in the caches
        for name in order:
            samples[name].append(timed(runs[name], device))
    return {name: statistics.median(times) for name, times in samples.items()}


def products(dtype: str, device: str) -> float:
    return matmul_gflop_per_second(dtype, device=device, threads=torch.get_num_threads())


def counted_gflop(heads: int, width: int, length: int) -> float:
    sizes = {"embed_dim": 2 * heads * width, "num_heads": heads, "num_kv_heads": heads, "head_dim": width}
    # Only the config matters, since operations are counted for a block.
    config = random_checkpoint(**sizes).config
    return attention_flop(config, Size(batch_size=1, sequence_length=length)) / 1e9


def peak_extra_bytes(impl: str, heads: int, width: int, length: int, dtype: torch.dtype) -> int:
    """Growth of this process's peak resident size in one call."""
    with torch.inference_mode():
        # A first call, so that libraries and threads are not counted.
        small = inputs(heads, width, 16, dtype, "cpu")
        diff_attention(*small, causal=True, impl=impl)
        q, k, v, lam = inputs(heads, width, length, dtype, "cpu")
        # Resets the peak resident size (man 5 proc_pid_clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
        diff_attention(q, k, v, lam, causal=True, impl=impl)
    return peak_resident_bytes() - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_in_own_process(impl: str, heads: int, width: int, length: int, dtype: str) -> float:
    arguments = ["--memory-of", impl, str(heads), str(width), str(length), dtype]
    # A separate process, since memory that other candidates have freed would be reused and not counted.
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


def cuda_memory(impl: str, heads: int, width: int, length: int, dtype: torch.dtype) -> float:
    run = candidates(*inputs(heads, width, length, dtype, "cuda"))[impl]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--memory-of", nargs=5, metavar=("IMPL", "HEADS", "WIDTH", "LENGTH", "DTYPE"))
    options = parser.parse_args()
    if options.memory_of:
        impl, *sizes, dtype = options.memory_of
        heads, width, length = map(int, sizes)
        print(peak_extra_bytes(impl, heads, width, length, getattr(torch, dtype)))
        return
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; B 1, causal, MHA")
    print("| dtype | h, d | S | implementation | ms | ratio to naive | share of products | extra MiB |")
    print("|---" * 8 + "|")
    for dtype in options.dtypes:
        for heads, width in SHAPES:
            for length in options.lengths:
                with torch.inference_mode():
                    rate = products(dtype, options.device)
                    found = latencies_ms(heads, width, length, getattr(torch, dtype), options.device)
                    # Other load on the machine can only have lowered one of the two.
                    rate = max(rate, products(dtype, options.device))
                gflop = counted_gflop(heads, width, length)
                for impl, latency in found.items():
                    memory = (
                        memory_in_own_process(impl, heads, width, length, dtype)
                        if options.device == "cpu"
                        else cuda_memory(impl, heads, width, length, getattr(torch, dtype))
                    )
                    ratio = latency / found["naive"] if "naive" in found else float("nan")
                    where = f"| {dtype} | {heads}, {width} | {length} | {impl} "
                    share = gflop / latency * 1e3 / rate
                    print(f"{where}| {latency:.3g} | {ratio:.3f} | {share:.0%} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
