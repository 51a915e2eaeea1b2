"""``diffdeploy bench MODEL_BUNDLE``: prefill and decode of models, checked before they are timed."""

import copy
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffdeploy
from diffdeploy.bench.models import read_model_report
from diffdeploy.bench.models.plan import NEW_TOKENS
from diffdeploy.bundle import open_bundle, read_weights, write_manifest
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.exporters import export_bundle
from diffdeploy.formats import require_format
from diffdeploy.formats.expected import expected_constants
from diffdeploy.runtime.decoding import Decoding
from tests.support.bundles import SMALL_MODEL, BundleCache
from tests.support.commands import refused
from tests.support.pairwise import rest_is_slow

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

TINY = ["--seq", "8,4", "--rounds", "6", "--threads", "1"]


@pytest.fixture(scope="module")
def sample_model(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), SMALL_MODEL)


@pytest.fixture(scope="module")
def llama(llama_pair: tuple[Path, Any]) -> Path:
    """A folder with a DiffLlama and a bundle of it."""
    return llama_pair[0].parent


@pytest.fixture(scope="module")
def saved(llama: Path) -> Path:
    """One run against transformers, with everything that can be written; shared."""
    outputs = [f"--{name}={llama / 'run'}.{kind}" for name, kind in (("save", "json"), ("csv", "csv"))]
    assert main(["bench", str(llama / "bundle"), str(llama / "checkpoint"), *TINY, *outputs]) == 0
    return llama / "run.json"


def test_prefill_and_decode_of_all_candidates(saved: Path) -> None:
    report = read_model_report(saved)
    assert (report.status, report.baseline) == ("measured", "transformers-sdpa")
    names = ["bundle", "eager-auto", "transformers-sdpa", "transformers-eager"]
    sizes = ["prefill-B1-S4", "prefill-B1-S8", "decode-B1-P4", "decode-B1-P8"]
    assert [(row.size.id, row.name) for row in report.results] == [(size, name) for size in sizes for name in names]
    for row in report.results:
        assert row.status == "measured", row.reason
        assert row.num_rounds == 6
        assert row.latency_ms is not None
        assert row.latency_low_ms is not None
        assert row.latency_low_ms <= row.latency_ms
        assert row.budget_used is not None
        assert 0 < row.budget_used < 1
        # A prompt is told as a whole, and decoding by the token.
        tokens = row.length if row.what == "prefill" else 1
        assert row.tokens_per_second == pytest.approx(1e3 * tokens / row.latency_ms, rel=1e-3)
        assert row.new_tokens == (row.length if row.what == "prefill" else NEW_TOKENS)
        # Generation stands around the calls of a runtime alone.
        assert (row.generate_overhead is not None) == (row.name == "bundle" and row.what == "decode")
    assert {row.ratio for row in report.results if row.name == report.baseline} == {1}


@pytest.mark.slow
def test_a_quantised_model_is_measured_with_the_weights_that_it_has(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(SMALL_MODEL, onnx_flavor="ort", weights="int8")
    export_bundle(read_model(llama / "checkpoint"), tmp_path / "int8", options, verify=False)
    assert main(["bench", str(tmp_path / "int8"), str(llama / "checkpoint"), *TINY, "--save", "int8.json"]) == 0
    assert "with the original weights, not the quantised ones" in capsys.readouterr().err
    report = read_model_report(Path("int8.json"))
    assert {(row.kind, row.status) for row in report.results} == {("bundle", "measured"), ("eager", "measured")}


@pytest.mark.slow
def test_activations_are_those_of_each_bundle(tmp_path: Path, llama: Path) -> None:
    found = read_model(llama / "checkpoint")
    for activations in ("float32", "int8"):
        options = replace(SMALL_MODEL, onnx_flavor="ort", weights="int4", activations=activations)
        export_bundle(found, tmp_path / activations, options, verify=False)
    paths = [str(tmp_path / activations) for activations in ("float32", "int8")]
    assert main(["bench", *paths, *TINY, "--save", "both.json"]) == 0
    report = read_model_report(Path("both.json"))
    assert {(row.name, row.status) for row in report.results if row.kind == "bundle"} == {
        ("float32", "measured"),
        ("int8", "measured"),
    }


def test_the_table_has_a_line_for_each_row(saved: Path) -> None:
    report = read_model_report(saved)
    with saved.with_suffix(".csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [row.name for row in report.results]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert float(rows[0]["latency_ms"]) == report.results[0].latency_ms
    assert "peak_bytes" not in rows[0]


@pytest.mark.slow
def test_a_run_is_compared_with_an_earlier_one(saved: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        str(llama / "bundle"),
        str(llama / "checkpoint"),
        "--seq",
        "4",
        "--rounds",
        "6",
        "--threads",
        "1",
    ]
    assert main([*command, "--compare", str(saved), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(change["name"], change["what"]) for change in result["changes"]] == [
        (name, what)
        for what in ("prefill", "decode")
        for name in ("bundle", "eager-auto", "transformers-sdpa", "transformers-eager")
    ]
    assert "the baseline was transformers-sdpa, but is eager-auto now" in refused(
        ["bench", str(llama / "bundle"), *TINY, "--compare", str(saved)], capsys
    )


@pytest.mark.slow
@pytest.mark.parametrize("flavor", rest_is_slow(["ort", None]))
def test_a_bare_call_is_the_one_that_generation_makes(flavor: str | None, bundles: BundleCache) -> None:
    path = bundles.bundle(read_model(SAMPLE), replace(SMALL_MODEL, onnx_flavor=flavor))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12))
    ones = np.ones((2, 13), np.int64)
    with diffdeploy.load(path) as runtime:
        decoding = Decoding(runtime, 2)
        decoding.reserve(16)
        decoding.feed(tokens, ones[:, :12])
        last = tokens[:, :1].copy()
        expected = copy.copy(decoding).feed(last, ones)
        call = decoding.bare_call(last, ones)
        for _ in range(2):
            found: Any = call()
            logits = found["logits"] if isinstance(found, dict) else found
            np.testing.assert_array_equal(logits[:, -1], expected)
        # Nothing of it stays.
        assert decoding.num_tokens == 12


@pytest.mark.slow
def test_a_wrong_bundle_is_said_and_not_timed(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the digests of its own, as a tool that was careless would leave it."""
    wrong = tmp_path / "wrong"
    shutil.copytree(llama / "bundle", wrong)
    bundle = open_bundle(wrong)
    weights = read_weights(bundle)
    name = "layers.1.ffn.up_proj.weight"
    format_ = require_format(bundle.manifest.format)
    format_.write_constants(
        wrong, expected_constants(bundle.manifest, weights), {name: weights[name] * np.float32(1.1)}
    )
    write_manifest(wrong, bundle.manifest)
    assert main(["bench", str(llama / "bundle"), str(wrong), "--impl", "none", *TINY, "--json"]) == 1
    said = capsys.readouterr()
    rows = json.loads(said.out)["results"]
    assert {(row["name"], row["status"]) for row in rows} == {("bundle", "measured"), ("wrong", "wrong")}
    assert all(row["latency_ms"] is None for row in rows if row["name"] == "wrong")
    assert "wrong is wrong at prefill-B1-S4" in said.err


def test_what_does_not_go_together_is_refused(
    sample_model: Path, llama: Path, sample_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(sample_model)

    def said(*arguments: str) -> str:
        return refused(["bench", *arguments], capsys)

    assert "--graph cannot be used with a bundle of a whole model; omit it" in said(model, "--graph", "cached")
    assert "--plot cannot be used with a bundle of a whole model" in said(model, "--plot", "x.svg")
    assert "does not hold the model of" in said(model, str(llama / "bundle"))
    assert "does not hold the model of" in said(model, str(llama / "checkpoint"))
    assert "holds a block" in said(model, str(sample_bundle))
    assert "made for 48 tokens, but --seq 41 plus 8 new ones is longer; give up to 40" in said(model, "--seq", "41")
    assert "made for batches up to 4, but --batch is 5" in said(model, "--batch", "5")
    assert "implementation 'fast' is not known" in said(model, "--impl", "fast")
    if not torch.cuda.is_available():
        assert "torch finds no CUDA device here" in refused(["bench", model, "--device", "cuda"], capsys, code=3)
    assert "baseline 'other' is not among the candidates" in said(model, "--baseline", "other")
    assert "is not a diffdeploy bench result for a model" in said(
        model, "--compare", str(llama / "bundle/manifest.json")
    )
