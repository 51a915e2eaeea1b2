"""Compare `fused` with the other ways to compute differential attention on CUDA with public kernels.

    python scripts/measure_plans.py [--lengths 1024 4096] [--output plans.json]

Attention is causal, batch 1, in bfloat16, with keys stored per stream. Every plan is checked against an fp64 formula
before it is timed. Calls are captured as CUDA graphs, so that kernels are timed rather than their launches, and all
plans of one size take turns. Above 25 million query-key pairs, the L2 cache is cleared between calls.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdeploy.bench.machine import matmul_gflop_per_second
from diffdeploy.bench.timing import as_cuda_graph
from diffdeploy.exclusive import without_warnings
from diffdeploy.ops import diff_attention

_ROUNDS = 15
_L2_BYTES = 128 * 2**20
_PAIRS_WITHOUT_CLEARING = 25e6
_LAMBDA = 0.4
# Several times half a unit in the last place of bfloat16, relative to the largest exact output: a plan that rounds both
# streams before it subtracts them is off by about one such half unit.
_TOLERANCE = 2**-6
_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Call = Callable[[], Tensor]


def inputs(heads: int, kv_heads: int, width: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[1, 2h, S, d]``, keys ``[1, 2 h_kv, S, d]``, values ``[1, h_kv, S, 2d]``."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 2 * heads, length, width), (1, 2 * kv_heads, length, width), (1, kv_heads, length, 2 * width)]
    return tuple(torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)  # type: ignore[return-value]


def difference(signal: Tensor, noise: Tensor) -> Tensor:
    """Subtract the streams in one kernel."""
    return torch.sub(signal, noise, alpha=_LAMBDA)


def both_streams(side: Tensor) -> Tensor:
    """View ``[1, 2H, S, d]`` as a batch of two, ``[2, H, S, d]``."""
    return side.reshape(-1, 2, *side.shape[2:]).transpose(0, 1)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both streams as a batch of two, whose values are views of the same memory."""
    queries, keys = both_streams(q), both_streams(k)
    grouped = q.shape[1] != k.shape[1]
    both = F.scaled_dot_product_attention(queries, keys, v.expand(2, -1, -1, -1), is_causal=True, enable_gqa=grouped)
    return difference(*both.chunk(2))


def flex(attention: Callable[..., Tensor], mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both streams as a batch of two, in FlexAttention."""
    queries, keys = both_streams(q), both_streams(k)
    grouped = q.shape[1] != k.shape[1]
    return difference(*attention(queries, keys, v.expand(2, -1, -1, -1), block_mask=mask, enable_gqa=grouped).chunk(2))


def flash4(attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call of FlashAttention-4 for each stream."""
    values = v.transpose(1, 2)
    signal, noise = (
        attention(q[:, stream::2].transpose(1, 2), k[:, stream::2].transpose(1, 2), values, causal=True)
        for stream in (0, 1)
    )
    signal, noise = (each[0] if isinstance(each, tuple) else each for each in (signal, noise))
    return difference(signal, noise).transpose(1, 2)


def with_backend(call: Call, backend: SDPBackend) -> Tensor:
    with sdpa_kernel([backend]):
        output: Tensor = call()
        return output


def differential_plans(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Plans by name; some do not run everywhere."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lam = torch.tensor(_LAMBDA, device="cuda")

    def of(impl: str) -> Call:
        return partial(diff_attention, q, k, v, lam, causal=True, impl=impl)

    plans: dict[str, Call] = {"folded": partial(folded, q, k, v)}
    plans |= {name: of(name) for name in ("fused", "auto", "two_call", "padded", "stacked_wide", "flash2")}
    for name, backend in _BACKENDS.items():
        plans[f"paired, {name}"] = partial(with_backend, of("paired"), backend)
    torch.compiler.reset()  # each size is compiled separately, and torch stops after eight of them
    length = q.shape[2]
    mask = create_block_mask(lambda _b, _h, row, column: row >= column, None, None, length, length, device="cuda")
    plans["FlexAttention"] = partial(flex, torch.compile(flex_attention, dynamic=False), mask, q, k, v)
    with suppress(ImportError):
        from flash_attn.cute import flash_attn_func

        plans["FlashAttention-4"] = partial(flash4, flash_attn_func, q, k, v)
    return plans


def softmax_plans(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Softmax attention with ``h`` heads of width ``2d``, which has as many parameters."""
    queries, keys = (side.reshape(1, -1, *v.shape[2:]) for side in (q, k))
    plain = partial(
        F.scaled_dot_product_attention, queries, keys, v, is_causal=True, enable_gqa=queries.shape[1] != v.shape[1]
    )
    plans: dict[str, Call] = {
        f"softmax, {name}": partial(with_backend, plain, backend) for name, backend in _BACKENDS.items()
    }
    with suppress(ImportError):
        from flash_attn.cute import flash_attn_func

        turned = [side.transpose(1, 2) for side in (queries, keys, v)]
        plans["softmax, FlashAttention-4"] = lambda: flash_attn_func(*turned, causal=True)[0]
    return plans


def exact(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int]) -> Tensor:
    """The formula in fp64 for some queries, ``[1, h, len(rows), 2d]``; scores are ``q k^T / sqrt(d)``."""
    heads, kv_heads = q.shape[1] // 2, v.shape[1]
    q64, k64, v64 = (side.double() for side in (q[:, :, list(rows)], k, v))
    hidden = torch.arange(k.shape[2], device="cuda")[None] > torch.tensor(list(rows), device="cuda")[:, None]
    v64 = v64.repeat_interleave(heads // kv_heads, 1)
    streams = []
    for stream in (0, 1):
        keys = k64[:, stream::2].repeat_interleave(heads // kv_heads, 1)
        scores = q64[:, stream::2] @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        streams.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v64)
    expected: Tensor = streams[0] - _LAMBDA * streams[1]
    return expected


def usable(plans: dict[str, Call], expected: Tensor | None, rows: Sequence[int]) -> Iterator[tuple[str, Call]]:
    """The plans that run and are right, as CUDA graphs where they can be captured; failures are named on stderr."""
    for name, call in plans.items():
        try:
            with without_warnings():  # torch warns about every kernel that it does not choose
                output = call()
        except Exception as error:  # noqa: BLE001 - packages raise what they like; the others are still measured
            print(f"{name} does not run: {str(error).strip().splitlines()[:1]}", file=sys.stderr)
            continue
        if expected is not None:
            off = float((output[:, :, list(rows)].double() - expected).abs().max() / expected.abs().max())
            if off > _TOLERANCE:
                print(f"{name} is wrong: off by {off:.2g} of the largest output", file=sys.stderr)
                continue
        graph = as_cuda_graph(call)
        if graph is None:
            print(f"{name} cannot be captured as a CUDA graph; its calls are timed", file=sys.stderr)
        yield name, graph or call  # type: ignore[misc]


def medians_us(calls: dict[str, Call], *, clears: bool) -> dict[str, float]:
    """Median times of calls that take turns, in microseconds."""
    other, generator, order = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda"), Random(0), list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = 1 if clears else 20
    for _ in range(_ROUNDS):
        generator.shuffle(order)
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            calls[name]()
            if clears:
                other.zero_()
            begin.record()
            for _ in range(repeats):
                calls[name]()
            end.record()
            end.synchronize()
            samples[name].append(float(begin.elapsed_time(end)) / repeats * 1e3)
    return {name: median(times) for name, times in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--shapes", nargs="+", default=["8,8,64", "8,2,64", "4,4,128", "4,1,128"], help="h,h_kv,d")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rate = matmul_gflop_per_second("bfloat16", device="cuda", threads=1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, products {rate / 1e3:.0f} TFLOP/s", flush=True)
    results: list[dict[str, Any]] = []
    for shape in given.shapes:
        heads, kv_heads, width = map(int, shape.split(","))
        for length in given.lengths:
            rows = [0, 1, length // 2, length - 1]
            with torch.inference_mode():
                sides = inputs(heads, kv_heads, width, length)
                calls = dict(usable(differential_plans(*sides), exact(*sides, rows), rows))
                calls |= dict(usable(softmax_plans(*sides), None, rows))
                times = medians_us(calls, clears=length * length / 2 > _PAIRS_WITHOUT_CLEARING)
            pairs = heads * length * (length + 1) / 2
            teraflops = {
                name: pairs * width * (8 if name.startswith("softmax") else 12) / us / 1e6 for name, us in times.items()
            }
            results.append({"h": heads, "h_kv": kv_heads, "d": width, "S": length, "us": times, "TFLOP/s": teraflops})
            shown = ", ".join(f"{name} {us:.1f} ({teraflops[name]:.0f})" for name, us in times.items())
            print(f"h {heads}, h_kv {kv_heads}, d {width}, S {length}: {shown}", flush=True)
            if given.output:
                given.output.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
