"""Benchmarks on CUDA: decoding is timed as CUDA graphs, and the report says how the device was found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdeploy.bench.machine import Machine
from diffdeploy.bench.timing import as_cuda_graph
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.exporters import ExportOptions, export_bundle

pytestmark = pytest.mark.gpu


def test_a_graph_computes_what_was_captured() -> None:
    x, out = torch.ones(5, device="cuda"), torch.zeros(5, device="cuda")
    graph = as_cuda_graph(lambda: out.copy_(2 * x))
    assert graph is not None
    x.fill_(4.0)
    graph()
    assert out.tolist() == [8.0] * 5


def test_a_call_that_waits_has_no_graph_and_does_no_harm() -> None:
    x = torch.ones(5, device="cuda")
    stream = torch.cuda.current_stream()
    assert as_cuda_graph(lambda: x.sum().item()) is None
    assert torch.cuda.current_stream() == stream
    assert as_cuda_graph(lambda: x + torch.ones(5, device="cuda")) is not None


def test_the_machine_tells_clocks_and_power() -> None:
    found = Machine.current(dtype="bfloat16", device="cuda", threads=1).gpu
    assert found is not None
    assert found.count("MHz") == 4
    assert found.endswith("W after matrix products")


def test_decoding_is_timed_as_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    sizes = ["--embed-dim", "256", "--num-heads", "2", "--seq", "64", "--rounds", "1"]
    run = ["--device", "cuda", "--dtype", "bfloat16", "--graph", "cached", "--impl", "auto,paired,softmax"]
    assert main(["bench", *run, *sizes, "--format", "none", "--save", str(file)]) == 0
    assert "timed as CUDA graphs" in capsys.readouterr().out
    saved = json.loads(file.read_text())
    assert [row["captured"] for row in saved["results"]] == [True] * 3


def test_a_graph_keeps_what_it_reads() -> None:
    """The tensors of a call are not freed, and given to others, as long as its graph is there."""

    def captured() -> tuple[Any, torch.Tensor]:
        x, out = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
        return as_cuda_graph(lambda: out.copy_(2 * x)), out

    graph, out = captured()
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(20)]
    graph()
    assert others
    assert bool((out == 2).all())


def test_models_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle of a model, and the eager model."""
    options = ExportOptions(format="pt2", graph="model", device="cuda", max_batch_size=4, max_sequence_length=48)
    export_bundle(read_model(SAMPLE), tmp_path / "model", options, verify=False)
    assert main(["bench", str(tmp_path / "model"), "--device", "cuda", "--seq", "16", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["status"] for row in result["results"]} == {"measured"}
    assert result["environment"]["device"] == torch.cuda.get_device_name()
