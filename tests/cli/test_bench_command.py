"""``diffdeploy bench`` as a user meets it: what it prints where, what it writes, and what it refuses."""

import csv
import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from diffdeploy.bench import run
from diffdeploy.bench.estimate import candidate_bytes
from diffdeploy.bench.plan import Plan
from diffdeploy.bench.results import read_report
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.cli.progress import Activity
from tests.support.commands import open_bundle_without_digests, refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

TINY = ["--embed-dim", "32", "--num-heads", "2", "--seq", "16,8", "--threads", "1", "--rounds", "7"]
FEW = ["--impl", "naive,padded,softmax", "--format", "onnx"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with everything that can be written, shown or printed; shared."""
    folder = tmp_path_factory.mktemp("bench")
    outputs = [
        f"--{name}={folder / 'run'}.{kind}" for name, kind in (("save", "json"), ("csv", "csv"), ("plot", "svg"))
    ]
    stages: list[str] = []
    with (folder / "stdout").open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(Activity, "phase", lambda _, text: stages.append(text))
        patch.setattr(
            Activity, "step", lambda _, text, left=None: stages.append(f"{stages[-1].partition('|')[0]}|{text}|{left}")
        )
        assert main(["bench", *TINY, *FEW, *outputs]) == 0
    (folder / "stages").write_text("\n".join(stages))
    return folder / "run.json"


def test_results_have_the_names_that_were_promised(saved: Path) -> None:
    result = json.loads(saved.read_text())
    assert (result["status"], result["baseline"]) == ("measured", "naive")
    assert [(row.get("impl") or row["format"], row["sequence_length"]) for row in result["results"]] == [
        (name, length) for length in (8, 16) for name in ("naive", "padded", "softmax", "onnx")
    ]
    for row in result["results"]:
        assert row["status"] == "measured"
        assert row["batch_size"] == 1
        assert row["num_rounds"] == 7
        assert 0 < row["latency_low_ms"] <= row["latency_ms"] <= row["latency_high_ms"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["peak_bytes"] == row["weight_bytes"] + row["extra_bytes"]
        assert 0 < row["budget_used"] < 1
        assert row["gflop_per_second"] == pytest.approx(1e3 * row["block_gflop"] / row["latency_ms"], rel=1e-3)
    assert all(row["ratio"] == 1 for row in result["results"] if row["name"] == "naive")
    environment = result["environment"]
    assert environment["packages"]["torch"] == version("torch")
    assert environment["threads"] == 1
    assert environment["matmul_gflop_per_second"] > 0
    assert result["command"] == (
        "diffdeploy bench --impl naive,padded,softmax --format onnx --seq 16,8 --embed-dim 32 --num-heads 2 "
        "--threads 1 --rounds 7"
    )


def test_the_table_says_what_it_shows_and_on_what(saved: Path) -> None:
    said = (saved.parent / "stdout").read_text()
    for text in (
        "sequence length 8, batch 1",
        "sequence length 16, batch 1",
        "softmax",
        "12 d",
        "95 % confidence interval",
        "extra MiB",
        f"torch {version('torch')}",
        "1 threads",
        "in the minute before",
    ):
        assert text in said


def test_what_was_written_beside_it(saved: Path) -> None:
    with saved.with_suffix(".csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 8
    assert lines[0]["torch"] == version("torch")
    drawn = saved.with_suffix(".svg").read_text()
    assert drawn.startswith("<?xml")
    assert str(saved.parent) not in drawn + saved.read_text()


def test_a_run_is_compared_with_an_earlier_one(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = json.loads(saved.read_text())
    for row in slow["results"]:
        if row["name"] == "padded":
            row.update(ratio=100.0, ratio_low=99.0, ratio_high=101.0)
    Path("slow.json").write_text(json.dumps(slow))
    few = ["--impl", "naive,padded", "--format", "none"]
    assert main(["bench", *TINY, *few, "--compare", "slow.json", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "the graph was plain, but is cached now" in refused(
        ["bench", *TINY, *few, "--graph", "cached", "--compare", "slow.json"], capsys
    )
    changes = {(change["name"], change["sequence_length"]): change for change in result["changes"]}
    assert set(changes) == {(name, length) for name in ("naive", "padded") for length in (8, 16)}
    assert changes["padded", 8]["significant"]
    assert changes["padded", 8]["ratio_change"] < -0.5


def test_a_wrong_bundle_is_shown_as_wrong_and_not_timed(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    from diffdeploy.bundle import write_manifest

    model = onnx.load(bundle_copy / "model.onnx")
    next(node for node in model.graph.node if node.op_type == "Sub" and "scaled" in node.input[0]).op_type = "Add"
    onnx.save(model, bundle_copy / "model.onnx")
    write_manifest(bundle_copy, open_bundle_without_digests(bundle_copy))
    arguments = ["--impl", "naive", "--seq", "8", "--rounds", "2", "--save", "run.json"]
    assert main(["bench", str(bundle_copy), *arguments]) == 1
    right, wrong = json.loads(Path("run.json").read_text())["results"]
    assert (right["status"], right["num_rounds"]) == ("measured", 2)
    assert (wrong["status"], wrong["latency_ms"], wrong["ratio"], wrong["peak_bytes"]) == ("wrong", None, None, None)
    said = capsys.readouterr()
    assert "bundle is wrong at B1-S8 and was not timed there" in said.out
    assert said.err.strip().splitlines()[-1] == "error: bundle is wrong at B1-S8: the error is above the budget"


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupt_prints_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show, stages = Activity.phase, []

    def phase(doing: Activity, text: str) -> None:
        stages.append(text)
        show(doing, text)

    def interrupted(_: Activity, text: str, seconds_left: float | None = None) -> None:
        if stages[-1] == "B1-S16" and text.startswith("round 3"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Activity, "phase", phase)
    monkeypatch.setattr(Activity, "step", interrupted)
    few = ["--impl", "naive,padded", "--format", "none"]
    assert main(["bench", *TINY, *few, "--save", "part.json", "--json"]) == 130
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1] == "error: interrupted; the measurements made so far are above"
    report = read_report(Path("part.json"))
    assert report.status == "interrupted"
    assert [(row.sequence_length, row.num_rounds >= 2) for row in report.results] == [
        *((8, True), (8, True), (16, True), (16, True))
    ]
    assert json.loads(said.out) == json.loads(Path("part.json").read_text())


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupt_before_anything_was_measured_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(doing: Activity, text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Activity, "phase", interrupted)
    assert main(["bench", *TINY, *FEW]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: interrupted\n")


def test_progress_says_what_runs_and_how_long_it_takes(saved: Path) -> None:
    stages = (saved.parent / "stages").read_text().splitlines()
    for wanted in (
        "exporting onnx",
        "loading naive",
        "B1-S8|checking onnx",
        "B1-S16|round 7 of 7",
        "memory of padded",
    ):
        assert any(stage.startswith(wanted) for stage in stages), wanted
    assert all(float(stage.rpartition("|")[2]) >= 0 for stage in stages if "|round" in stage)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--impl", "naive,fast"], "implementation 'fast' is not known; accepted: naive,", 2),
        (["--format", "tflite"], "format 'tflite' is not known; accepted: onnx,", 2),
        (["--format", "flash2"], "flash2", 3),
        (["--impl", "flash2", "--format", "none"], "flash2 runs on CUDA only", 3),
        (["--seq", "128,x"], "--seq is '128,x'; accepted: comma-separated positive integers", 2),
        (["--batch", "0"], "--batch is '0'; accepted: comma-separated positive integers", 2),
        (["--seq", "1000000", "--impl", "naive", "--format", "none"], "naive at B1-S1000000 needs about", 3),
        (["--impl", "naive", "--format", "none", "--baseline", "onnx"], "baseline 'onnx' is not among", 2),
        (["--plot", "figure.pdf"], "accepted: file names that end in .svg or .png", 2),
        (["--save", "nowhere/run.json"], "nowhere/run.json cannot be written", 2),
        (["--compare", "nowhere.json"], "nowhere.json is not a result of diffdeploy bench", 2),
        (["nowhere.pt"], "nowhere.pt does not exist", 2),
        (["--num-heads", "3"], "--embed-dim 1024 is not a multiple of 2 * --num-heads 3", 2),
        (["--layer", "1"], "--layer is for reading a checkpoint, but no checkpoint is given", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["bench", *arguments], capsys, code=code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch finds no CUDA device here" in refused(["bench", "--device", "cuda"], capsys, code=3)


def test_a_bundle_that_does_not_fit_the_rest_is_refused(
    sample_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(sample_bundle)
    for arguments, message in (
        ([bundle, "--seq", "512"], "bundle bundle is made for sequence_length up to 256, but --seq needs 512"),
        ([bundle, "--dtype", "float16"], "--dtype is float16, but bundle bundle has float32"),
        ([bundle, "--graph", "cached"], "--graph is cached, but bundle bundle has plain"),
        ([bundle, "--embed-dim", "64"], "sizes are for a random block"),
        ([bundle, str(SAMPLE), "--layer", "0"], "bundle bundle does not hold the block of sample"),
        ([str(SAMPLE), str(SAMPLE)], "are two checkpoints; give one"),
    ):
        assert message in refused(["bench", *arguments], capsys)


@pytest.mark.slow
def test_a_checkpoint_with_its_bundle(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--seq", "8", "--batch", "2,1", "--rounds", "1"]
    arguments = ["bench", str(SAMPLE), str(sample_bundle), "--layer", "1", "--impl", "padded", *sizes, "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["baseline"], result["block"]["source"], result["block"]["num_kv_heads"]) == ("padded", "sample", 2)
    assert [(row["name"], row["batch_size"], row["ratio_low"]) for row in result["results"]] == [
        (name, batch, None) for batch in (1, 2) for name in ("padded", "bundle")
    ]


@pytest.mark.slow
def test_one_token_is_decoded_with_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--graph", "cached", "--impl", "two_call", "--format", "pt2", "--baseline", "pt2"]
    assert main(["bench", *TINY, *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["past_sequence_length"], row["sequence_length"]) for row in result["results"]] == [
        (name, past, 1) for past in (8, 16) for name in ("two_call", "pt2")
    ]
    assert result["baseline"] == "pt2"


@pytest.mark.slow
def test_estimates_of_memory_are_not_too_low(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held against what is measured, at a size where the scores are much larger than all else."""
    plans: list[Plan] = []

    def both_at_once(plan: Plan, _: int) -> bool:
        plans.append(plan)
        return True

    monkeypatch.setattr(run, "fits_twice", both_at_once)
    arguments = ["--embed-dim", "64", "--num-heads", "8", "--seq", "512", "--rounds", "1", "--format", "none"]
    assert main(["bench", *arguments, "--impl", "naive,padded", "--json"]) == 0
    for candidate, row in zip(plans[0].candidates, json.loads(capsys.readouterr().out)["results"], strict=True):
        estimated = candidate_bytes(plans[0], candidate, plans[0].sizes[0])
        assert estimated / 3 < row["extra_bytes"] < estimated + 2**20, candidate.name


@pytest.mark.gpu
def test_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cuda", "--dtype", "bfloat16", "--seq", "512", "--impl", "all", "--format", "pt2"]
    assert main(["bench", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(row["status"] == "measured" for row in result["results"])
    assert result["environment"]["device"] == torch.cuda.get_device_name()
