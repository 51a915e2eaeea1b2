"""No false alarm: random right blocks are exported in random ways and verified on random inputs, and all must pass.

    python -m tests.campaign [--runs 1000] [--seeds 5] [--cases full] [--minutes 60] [--shard 0/4] [--without aoti]
        [--output FILE]

A run is one export verified with one seed, on inputs of every kind and scale: on the full sweep, or as many cases of
it as are asked for, with the first seed of an export; on a quick sweep and ten random cases, in one thread, with the
others. Runs are numbered, and the number says
everything about one, so a campaign that was stopped goes on where it was, and several processes or machines can share
it: each takes every ``N``-th export into a file of its own, and the files are put together with ``cat``. The output
holds a report on each line.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import WEIGHTS, open_bundle
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import (
    LAMBDA_VECTORS,
    AnyConfig,
    DiffAttentionConfig,
    DiffAttentionV2Config,
    RopeConfig,
    RopeStyle,
    lambda_init_at,
)
from diffdeploy.errors import ExportError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.formats import RunOptions, Selection
from diffdeploy.graphs import DType
from diffdeploy.verify import BUDGETS, Report, rejudge, verify_bundle
from diffdeploy.verify.properties import property_checks
from diffdeploy.verify.run import run_case
from diffdeploy.verify.sweep import random_cases, select_cases
from diffdeploy.verify.threads import half_the_threads
from diffdeploy.verify.worker import ArtifactProcess
from diffdeploy.verify.yardsticks import Yardsticks

SEEDS_PER_EXPORT = 5
NUM_RANDOM_CASES = 10
# By how long an export takes: compilers need ten times as long as tracing.
FORMATS = ("onnx", "onnx", "onnx", "onnx-ort", "onnx-ort", "pt2", "pt2", "pt2", "pt2", "pt2", "aoti")
DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
DTYPES_OF_ONNX: tuple[DType, ...] = ("float32", "float16")


@dataclass(frozen=True)
class Run:
    """One verification.

    Attributes:
        number: of the run, from 0.
        format: with the flavor.
        report: of the verification.
    """

    number: int
    format: str
    report: Report


def random_config(choose: random.Random, *, for_ort: bool) -> AnyConfig:
    kv_heads = choose.choice([1, 2, 3, 4])
    styles: list[RopeStyle | None] = ["interleaved", "half", None]
    style = choose.choice(styles)
    rope = RopeConfig(style=style, theta=choose.choice([1e4, 5e5])) if style else None
    causal = choose.random() < 0.8 or for_ort
    sizes: dict[str, Any] = {
        "embed_dim": choose.choice([16, 48, 128, 256, 512, 768]),
        "num_heads": kv_heads * choose.choice([1, 1, 2, 3]),
        "num_kv_heads": kv_heads,
        "head_dim": choose.choice([16, 32, 64] if for_ort else [4, 8, 16, 32, 64]),
        "sliding_window": choose.choice([None, None, None, 5]) if causal else None,
    }
    if choose.random() < 0.15:
        return DiffAttentionV2Config(causal=causal, rope=rope, **sizes)
    # Near 1 the streams nearly cancel.
    lambda_init = choose.choice([lambda_init_at(choose.randrange(30))] * 7 + [0.98])
    return DiffAttentionConfig(
        lambda_init=lambda_init,
        output_scale=1 - lambda_init,
        causal=causal,
        rope=rope,
        norm_affine=choose.random() < 0.8,
        qk_norm_eps=choose.choice([None, None, None, 1e-6]),
        qkv_bias=choose.random() < 0.3,
        out_bias=choose.random() < 0.3,
        norm_eps=choose.choice([1e-5, 1e-6]),
        gqa_layout=choose.choice(["canonical", "canonical", "legacy"]),
        **sizes,
    )


def random_block(choose: random.Random, format_name: str) -> Checkpoint:
    config = random_config(choose, for_ort=format_name == "onnx-ort")
    generator = torch.Generator().manual_seed(choose.randrange(2**31))
    gain = choose.choice([0.5, 1.0, 2.0]) * config.embed_dim**-0.5
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if name in LAMBDA_VECTORS else gain)
        for name, shape in config.weight_shapes().items()
    }
    for name in ("subln.weight", "q_norm.weight", "k_norm.weight"):
        if name in weights:
            weights[name] = 1 + 0.2 * torch.randn(weights[name].shape, generator=generator)
    return Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))


def random_options(choose: random.Random, format_name: str) -> ExportOptions:
    name, _, flavor = format_name.partition("-")
    return ExportOptions(
        format=name,
        graph=choose.choice(["plain", "masked"] if flavor else ["plain", "masked", "cached"]),
        dtype=choose.choice(DTYPES_OF_ONNX if name == "onnx" else DTYPES),
        max_batch_size=4,
        max_sequence_length=choose.choice([16, 200, 300]),
        onnx_flavor="ort" if flavor else None,
        opset=choose.choice([18, 20, 21, 23, 24]) if format_name == "onnx" else None,
        # AOTInductor calls a fused attention on the CPU for equal head widths alone, and its contract demands one.
        impl="auto" if flavor or name == "aoti" else choose.choice(["two_call", "padded"]),
    )


def runs_of_export(
    number: int, seeds: int, formats: tuple[str, ...] = FORMATS, *, cases: Selection = "full"
) -> Iterator[Run]:
    """Export number ``number``, verified with each of its seeds."""
    choose = random.Random(number)
    format_name = formats[number % len(formats)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export_bundle(random_block(choose, format_name), path, random_options(choose, format_name), verify=False)
        first = number * seeds
        report = verify_bundle(path, seed=first, cases=cases)
        yield Run(first, format_name, report)
        yield from _more_runs(path, format_name, report, range(first + 1, first + seeds))


def _more_runs(path: Path, format_name: str, report: Report, seeds: range) -> Iterator[Run]:
    bundle = open_bundle(path)
    config, spec = bundle.manifest.block, bundle.manifest.graph
    exact: dict[str, Array] = {
        name: array.astype(np.float64) for name, array in read_safetensors(path / WEIGHTS).items()
    }
    yardsticks = Yardsticks(bundle, exact)
    with ArtifactProcess(path, RunOptions(threads=1)) as artifact, half_the_threads():
        for seed in seeds:
            quick = select_cases("quick", config, spec, seed)
            cases = [*quick, *islice(random_cases(config, spec, seed), NUM_RANDOM_CASES)]
            reports = [run_case(case, bundle, artifact, yardsticks) for case in cases]
            checks = property_checks(artifact, config, spec, seed)
            yield Run(seed, format_name, report.model_copy(update={"seed": seed, "cases": reports, "contract": checks}))


def table(runs: list[Run]) -> str:
    """Runs, cases, false alarms and the distribution of the budget used, by format and dtype."""
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for run in runs:
        key = (run.format, str(run.report.dtype))
        counts[key][0] += 1
        counts[key][1] += not run.report.passed
        shares[key] += [output.severity for case in run.report.cases for output in case.outputs]
    row = "{:<10} {:<9} {:>5} {:>8} {:>7} {:>7} {:>6} {:>6}"
    lines = [row.format("format", "dtype", "runs", "outputs", "alarms", "median", "p99", "max")]
    for key in sorted(counts):
        used = shares[key]
        quantiles = [f"{value:.0%}" for value in (*np.quantile(used, [0.5, 0.99]), max(used))]
        lines.append(row.format(*key, counts[key][0], len(used), counts[key][1], *quantiles))
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines.append(f"{total[0]} runs, {sum(map(len, shares.values()))} outputs of cases, {total[1]} false alarms")
    return "\n".join(lines)


def read_runs(path: Path) -> list[Run]:
    """The runs in a file, as far as it was written, judged by the budgets of today."""
    if not path.exists():
        return []
    runs = []
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        report = Report.model_validate(fields["report"])
        runs.append(Run(fields["number"], fields["format"], rejudge(report, BUDGETS[report.dtype])))
    return runs


def campaign(
    num_runs: int,
    minutes: float,
    output: Path,
    *,
    seeds: int = SEEDS_PER_EXPORT,
    cases: Selection = "full",
    shard: tuple[int, int] = (0, 1),
    without: Sequence[str] = (),
) -> list[Run]:
    """Go on with a campaign until it has so many runs or the time is up.

    Args:
        num_runs: of the whole campaign.
        minutes: to go on for.
        output: file of runs.
        seeds: runs of an export.
        cases: of the first of them.
        shard: which part of how many.
        without: formats to leave to others.

    Raises:
        ExportError: right blocks could not be exported; all others were tried, and are in the file.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    runs, deadline = read_runs(output), time.monotonic() + 60 * minutes
    done, failed = {run.number for run in runs}, []
    for number in range(shard[0], -(-num_runs // seeds), shard[1]):
        if time.monotonic() > deadline:
            break
        if FORMATS[number % len(FORMATS)] in without:
            continue
        numbers = range(number * seeds, (number + 1) * seeds)
        if done.issuperset(numbers):
            continue
        try:
            new = list(runs_of_export(number, seeds, cases=cases))
        except ExportError as error:
            print(f"export {number} ({FORMATS[number % len(FORMATS)]}) could not be made: {error}", flush=True)
            failed.append(number)
            continue
        lines = [
            json.dumps({"number": run.number, "format": run.format, "report": run.report.model_dump(mode="json")})
            for run in new
        ]
        with output.open("a") as stream:  # whole exports only
            stream.write("".join(line + "\n" for line in lines))
        runs += new
        for run in new:
            if not run.report.passed:
                print(f"run {run.number} ({run.format}): {run.report.first_failure()}", flush=True)
        print(f"{len(runs)} runs", file=sys.stderr, flush=True)
    if failed:
        raise ExportError(f"{len(failed)} of the exports could not be made: {', '.join(map(str, failed))}")
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=SEEDS_PER_EXPORT, help="runs of an export")
    parser.add_argument("--cases", type=int, help="cases of the first of them; by default all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--output", type=Path, default=Path("artifacts/campaign.jsonl"))
    parser.add_argument("--shard", default="0/1", help="this part of so many, such as 0/4")
    parser.add_argument("--without", nargs="+", default=[], help="formats to leave out")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.shard.split("/"))
    unmade = None
    try:
        campaign(
            arguments.runs,
            arguments.minutes,
            arguments.output,
            seeds=arguments.seeds,
            cases=arguments.cases or "full",
            shard=(part, parts),
            without=arguments.without,
        )
    except ExportError as error:
        unmade = str(error)
    runs = read_runs(arguments.output)
    print(table(runs) if unmade is None else f"{table(runs)}\n{unmade}")
    return int(unmade is not None or any(not run.report.passed for run in runs))


if __name__ == "__main__":
    sys.exit(main())
