"""Time prompts and decoding of whole models on CUDA (eager, compiled, AOTInductor), differential and softmax.

    python scripts/measure_models.py --model 254m --model 1.5b --output models.json

Weights are random. Decoding writes its cache in place and is also captured as a CUDA graph, so that kernels are timed
rather than their launches; AOTInductor returns a new cache, as its graphs do. Models are called without a mask.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdeploy.bench.machine import matmul_gflop_per_second
from diffdeploy.bench.timing import as_cuda_graph
from diffdeploy.bundle import WEIGHTS
from diffdeploy.config import DecoderConfig, DiffAttentionConfig, LayerConfig, MlpConfig, RopeConfig
from diffdeploy.exporters.aoti import lower
from diffdeploy.formats.aoti.backend import MODEL
from diffdeploy.graphs import graph_spec
from diffdeploy.modules import DiffTransformer
from diffdeploy.modules.block import KeyValueCache, Rotation

_ROUNDS = 30
_VOCABULARY = 32_000
# Layers, model width and MLP width; heads have d 64, and there are as many key/value heads as heads.
_SIZES = {"tiny": (2, 256, 512), "254m": (16, 1024, 2816), "1.5b": (26, 2048, 5632)}
_DIFFERENTIAL, _SOFTMAX, _SOFTMAX_FLASH = "differential", "softmax", "softmax, flash-attn"
_IMPL = "fused"
# Options of inductor: products of one row become reductions, and independent kernels share a launch.
_TUNED: dict[str, Any] = {"coordinate_descent_tuning": True, "combo_kernels": True, "combo_kernel_allow_mixed_sizes": 1}
_WAYS = ("eager", "compile", "tuned")
Call = Callable[[], object]
Cache = list[KeyValueCache]


def config_of(name: str) -> DecoderConfig:
    """The config of a size in `_SIZES`."""
    layers, width, hidden = _SIZES[name]
    heads = width // 128
    attention = DiffAttentionConfig(
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        lambda_init=0.8,
        output_scale=0.2,
        rope=RopeConfig(style="half", theta=10_000.0),
    )
    layer = LayerConfig(attention=attention, mlp=MlpConfig(hidden_dim=hidden))
    return DecoderConfig(vocab_size=_VOCABULARY, embed_dim=width, norm_eps=1e-5, layers=(layer,) * layers)


class Softmax(nn.Module):
    """The projections of a differential block with plain softmax attention, ``2h`` heads of width ``d``."""

    def __init__(self, block: Any, *, decodes_by_package: bool) -> None:
        super().__init__()
        self.block, self.decodes_by_package = block, decodes_by_package

    def compute(
        self, x: Tensor, _mask: None, rotate: Rotation, past: KeyValueCache | None, *, total_length: int | None
    ) -> tuple[Tensor, KeyValueCache]:
        """See `AttentionBlock.compute`."""
        assert total_length is None
        block, width = self.block, self.block.config.head_dim
        q, k, v = (
            side(x).reshape(*x.shape[:2], -1, width).transpose(1, 2)
            for side in (block.q_proj, block.k_proj, block.v_proj)
        )
        q, k = rotate(q), rotate(k)
        if past is not None:
            k, v = in_place(past, (k, v))
        if past is not None and self.decodes_by_package:
            import flash_attn

            output = flash_attn.flash_attn_with_kvcache(*(side.transpose(1, 2) for side in (q, k, v))).transpose(1, 2)
        else:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return block.out_proj(output.transpose(1, 2).flatten(2)), (k, v)


def in_place(past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
    """A cache whose last cell is for the new token."""
    for side, cell in zip(past, new, strict=True):
        side[:, :, -1:] = cell
    return past


def model_of(name: str, config: DecoderConfig, device: str, positions: int) -> DiffTransformer:
    """Create a model with random weights in bfloat16, the same for each attention."""
    torch.manual_seed(0)
    model = DiffTransformer(config, impl=_IMPL, max_positions=positions, dtype=torch.bfloat16, device=device)
    model.requires_grad_(False).eval().freeze()
    for layer in model.layers:
        if name == _DIFFERENTIAL:
            layer.self_attn.append = in_place  # type: ignore[method-assign]
        else:
            layer.self_attn = Softmax(layer.self_attn, decodes_by_package=name == _SOFTMAX_FLASH)  # type: ignore[assignment]
    return model


class Prefill(nn.Module):
    """Logits after a prompt ``[B, S]``."""

    def __init__(self, model: DiffTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits, ``[B, 1, V]``."""
        logits: Tensor = self.model(ids, last_only=True)
        return logits


class Decode(nn.Module):
    """Logits after one token, which occupies the last position of every cache."""

    def __init__(self, model: DiffTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, caches: Cache) -> Tensor:
        """Compute the logits, ``[B, 1, V]``."""
        model = self.model
        turn, x = model.rotation(1, positions, 0), model.embedding(ids)
        for layer, past in zip(model.layers, caches, strict=True):
            x, _ = layer(x, None, turn, past)
        logits: Tensor = model.lm_head(model.norm(x))
        return logits


def latency_ms(call: Call) -> float:
    """Median of single calls between events, after two that do not count."""
    samples = []
    for number in range(_ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        if number > 1:
            samples.append(float(begin.elapsed_time(end)))
    return median(samples)


def copy_bytes_per_second() -> float:
    """Bytes per second that a copy between buffers of 2 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.int16, device="cuda").random_(0, 100)
    target = torch.empty_like(source)
    seconds = latency_ms(lambda: target.copy_(source)) / 1e3
    return 2 * source.numel() * source.element_size() / seconds


def caches_of(config: DecoderConfig, name: str, batch: int, tokens: int, device: str) -> Cache:
    """Create random caches of that many tokens."""
    block = config.attention
    heads, width = block.num_kv_heads, block.value_dim
    shape = (batch, heads, tokens, width) if name == _DIFFERENTIAL else (batch, 2 * heads, tokens, block.head_dim)
    sides = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2 * config.num_layers))
    return list(zip(sides, sides, strict=True))


def read_bytes(config: DecoderConfig, batch: int, tokens: int) -> int:
    """Number of bytes that decoding a token must read: all weights but the embedding, and the caches."""
    shapes = config.weight_shapes()
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name != "embedding.weight")
    block = config.attention
    cached = config.num_layers * batch * tokens * block.num_kv_heads * (block.key_cache_dim + block.value_dim)
    return 2 * (weights + cached)


@contextmanager
def fastest_backends(name: str) -> Iterator[None]:
    """Use cuDNN and FlashAttention for softmax attention, which are faster than torch's other kernels."""
    if name == _DIFFERENTIAL:
        yield
        return
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        yield


@dataclass
class Run:
    """One measurement, and the file of its results.

    Attributes:
        prompts: lengths of the prompts.
        pasts: numbers of tokens after which one is decoded.
        batches: numbers of rows, when decoding.
        output: file of the results.
        compile_only: true to fill inductor's cache, and measure nothing.
        ways: names in `_WAYS`; ``tuned`` is for decoding alone.
        bandwidth: bytes per second of a copy.
    """

    prompts: Sequence[int]
    pasts: Sequence[int]
    batches: Sequence[int]
    output: Path | None
    compile_only: bool
    ways: Sequence[str]
    bandwidth: float = math.nan

    def __post_init__(self) -> None:
        self._results: list[dict[str, Any]] = []
        if not self.compile_only:
            self.bandwidth = copy_bytes_per_second()
            rate = matmul_gflop_per_second("bfloat16", device="cuda", threads=1)
            device = torch.cuda.get_device_name()
            self.note(device=device, torch=torch.__version__, copy=self.bandwidth, products_gflop=rate)

    @property
    def longest(self) -> int:
        """Number of positions that models are created for."""
        return max(*self.prompts, *self.pasts) + 64

    def note(self, **fields: Any) -> None:
        """Keep, print and write a result."""
        self._results.append(fields)
        print(json.dumps(fields), flush=True)
        if self.output:
            self.output.write_text(json.dumps(self._results, indent=1))

    def measure(self, call: Call, how: str, *, bytes_read: int | None = None, **fields: Any) -> None:
        """Note the latency of a call, and its share of the bandwidth of a copy."""
        call()
        if self.compile_only:
            return
        ms = latency_ms(call)
        share = None if bytes_read is None else bytes_read / (ms / 1e3) / self.bandwidth
        self.note(**fields, how=how, ms=ms, share=share)

    def decode(self, call: Call, how: str, **fields: Any) -> None:
        """Measure a call, and its CUDA graph if it can be captured."""
        self.measure(call, how, what="decode", **fields)
        if not self.compile_only:
            graph = as_cuda_graph(call)
            if graph is not None:
                self.measure(graph, f"{how}, CUDA graph", what="decode", **fields)


def measure_model(run: Run, size: str, name: str) -> None:
    """Time prompts and decoding, eager and compiled."""
    config = config_of(size)
    model = model_of(name, config, "cuda", run.longest)
    prefill, decode = Prefill(model), Decode(model)
    ways: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "eager": (prefill, decode),
        "compile": (torch.compile(prefill, fullgraph=True), torch.compile(decode, fullgraph=True)),
        "tuned": (prefill, torch.compile(decode, fullgraph=True, options=_TUNED)),
    }
    for how in run.ways:
        # torch.compile does not know the operators of flash-attn.
        if how != "eager" and name == _SOFTMAX_FLASH:
            continue
        run_prefill, run_decode = ways[how]
        fields: dict[str, Any] = {"model": size, "attention": name}
        for length in run.prompts if name != _SOFTMAX_FLASH and how != "tuned" else ():
            ids = torch.randint(0, _VOCABULARY, (1, length), device="cuda")
            run.measure(partial(run_prefill, ids), how, what="prefill", batch=1, tokens=length, **fields)
        for batch in run.batches:
            for past in run.pasts:
                ids = torch.randint(0, _VOCABULARY, (batch, 1), device="cuda")
                positions = torch.full((batch, 1), past, device="cuda")
                caches = caches_of(config, name, batch, past + 1, "cuda")
                needed = read_bytes(config, batch, past + 1)
                call = partial(run_decode, ids, positions, caches)
                run.decode(call, how, batch=batch, tokens=past, bytes_read=needed, **fields)


def measure_package(run: Run, size: str) -> None:
    """Time an AOTInductor package of the graph in model bundles, with a mask, positions and growing caches."""
    config = config_of(size)
    torch.manual_seed(0)
    model = DiffTransformer(config, impl=_IMPL, max_positions=run.longest, dtype=torch.bfloat16)
    model.requires_grad_(False).eval().freeze()
    spec = graph_spec(
        "model", config, dtype="bfloat16", max_batch_size=8, max_sequence_length=run.longest, logits="last"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / WEIGHTS).write_bytes(b"")
        lower(model, spec, Path(folder), "cuda")
        package = torch._inductor.aoti_load_package(str(Path(folder) / MODEL))  # noqa: SLF001 - no public name
    fields: dict[str, Any] = {"model": size, "attention": _DIFFERENTIAL, "batch": 1}
    for length, past in (*((prompt, 0) for prompt in run.prompts), *((1, past) for past in run.pasts)):
        ids = torch.randint(0, _VOCABULARY, (1, length), device="cuda")
        mask = torch.ones(1, past + length, dtype=torch.int64, device="cuda")
        positions = torch.arange(past, past + length, device="cuda")[None]
        sides = [side for pair in caches_of(config, _DIFFERENTIAL, 1, past, "cuda") for side in pair]
        call = partial(package, ids, mask, positions, *sides)
        if past:  # without a CUDA graph: capturing a package fails
            needed = read_bytes(config, 1, past + 1)
            run.measure(call, "aoti", what="decode", tokens=past, bytes_read=needed, **fields)
        else:
            run.measure(call, "aoti", what="prefill", tokens=length, **fields)


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(_SIZES), default=[])
    parser.add_argument("--aoti", action="append", choices=list(_SIZES), default=[])
    parser.add_argument("--prompt", type=int, action="append")
    parser.add_argument("--past", type=int, action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--compile-only", action="store_true", help="fill inductor's cache, and measure nothing")
    parser.add_argument("--way", action="append", choices=_WAYS, help="[default: eager and compile]")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sizes = given.prompt or [4096], given.past or [4096], given.batch or [1]
    ways = given.way or ["eager", "compile"]
    if given.compile_only:
        ways = [way for way in ways if way != "eager"]
    run = Run(*sizes, given.output, given.compile_only, ways)
    for size in given.model:
        for name in (_DIFFERENTIAL, _SOFTMAX, _SOFTMAX_FLASH):
            with torch.no_grad(), fastest_backends(name):
                measure_model(run, size, name)
    for size in given.aoti:
        with torch.no_grad():
            measure_package(run, size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
