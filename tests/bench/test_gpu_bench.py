"""Benchmarks on CUDA: decoding is timed as CUDA graphs, and the report says how the device was found."""

import json
from pathlib import Path

import pytest
import torch

from diffdeploy.bench.machine import Machine
from diffdeploy.bench.timing import as_cuda_graph
from diffdeploy.cli.main import main

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
