"""Plans of benchmarks, and made-up benchmark reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffdeploy.bench import BenchReport, Block, Candidate, Plan, Row, Size
from diffdeploy.bench.machine import Machine
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.graphs import DType, Variant


def make_plan(
    block: Checkpoint,
    folder: Path,
    *sizes: Size,
    graph: Variant = "plain",
    dtype: DType = "float32",
    impls: tuple[str, ...] = ("naive",),
) -> Plan:
    from safetensors.torch import save_file

    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in block.weights.items()}
    save_file(weights, folder / "weights.safetensors")
    return Plan(
        config=block.config,
        weights=folder / "weights.safetensors",
        graph=graph,
        dtype=dtype,
        device="cpu",
        threads=1,
        sizes=sizes,
        candidates=tuple(map(Candidate.of_impl, impls)),
        baseline=impls[0],
    )


def make_report(latencies: Mapping[str, float], *, spread: float = 0.01, **changes: Any) -> BenchReport:
    """A run at two lengths, where the second takes ten times as long."""
    rows = [
        Row(
            name=name,
            impl=None if name == "onnx" else name,
            format="onnx" if name == "onnx" else None,
            batch_size=1,
            sequence_length=length,
            past_sequence_length=0,
            status="measured",
            num_rounds=9,
            latency_ms=latency * factor,
            latency_low_ms=latency * factor * (1 - spread),
            latency_high_ms=latency * factor * (1 + spread),
            latency_iqr_ms=latency * factor * spread,
            ratio=latency / latencies["naive"],
            ratio_low=latency / latencies["naive"] * (1 - spread),
            ratio_high=latency / latencies["naive"] * (1 + spread),
            peak_bytes=3 * 2**20,
            weight_bytes=2**20,
            extra_bytes=2 * 2**20,
            block_gflop=2.0 * factor,
            attention_gflop=1.0,
            gflop_per_second=100.0,
            matmul_share=0.5,
        )
        for length, factor in ((128, 1), (512, 10))
        for name, latency in latencies.items()
    ]
    environment = Machine(
        diffdeploy="0",
        measured_at="2026-01-01T00:00:00+00:00",
        platform="Linux",
        python="3.11",
        cpu="a processor",
        num_cpus=2,
        threads=2,
        device="cpu",
        packages={"torch": "2"},
        load_average=0.1,
        other_load=0.02,
        matmul_gflop_per_second=200.0,
    )
    sizes = {"embed_dim": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 2}
    fields: dict[str, Any] = {
        "status": "measured",
        "command": "diffdeploy bench",
        "block": Block(source="here", version=1, causal=True, rope=None, sliding_window=None, **sizes),
        "graph": "plain",
        "dtype": "float32",
        "baseline": "naive",
        "results": rows,
        "environment": environment,
    }
    return BenchReport(**{**fields, **changes})
