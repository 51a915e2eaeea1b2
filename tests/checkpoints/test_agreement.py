"""Fields of ``config.json`` that contradict a block are refused, until the user says which is right."""

import json
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
from safetensors.torch import save_file

from diffdeploy.bench.request import BenchRequest
from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import CheckpointOptions
from diffdeploy.cli.checkpoint_options import _options
from diffdeploy.cli.main import main
from tests.support.blocks import make_config, random_weights
from tests.support.commands import refused

ARGUMENTS = ["export", "block.safetensors", "--format", "pt2", "--no-verify", "--output", "out"]
KNOWN = ["--depth", "2", "--rope", "none"]


@pytest.fixture
def _block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = random_weights(make_config(num_kv_heads=4))
    save_file({name: tensor.float() for name, tensor in weights.items()}, "block.safetensors")


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(
    ("stated", "option", "attribute", "value"),
    [
        ({"causal": False}, ["--no-causal"], "causal", False),
        ({"is_causal": False}, ["--causal"], "causal", True),
        ({"sliding_window": 3}, ["--sliding-window", "3"], "sliding_window", 3),
        ({"window_size": 3}, ["--sliding-window", "0"], "sliding_window", None),
        ({"lambda_init": 0.25}, ["--lambda-init", "0.25"], "lambda_init", 0.25),
        ({"rms_norm_eps": 0.5}, ["--norm-eps", "0.5"], "norm_eps", 0.5),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict | list) else "",
)
def test_a_contradiction_is_refused_and_settled_by_the_option_that_is_named(
    stated: dict[str, object],
    option: list[str],
    attribute: str,
    value: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("config.json").write_text(json.dumps(stated))
    said = refused([*ARGUMENTS, *KNOWN], capsys)
    assert f"{next(iter(stated))} is" in said
    assert option[0].replace("--no-causal", "--causal") in said
    assert main([*ARGUMENTS, *KNOWN, *option]) == 0
    assert getattr(open_bundle("out").manifest.config, attribute) == value


def test_every_fact_that_a_file_may_leave_open_is_an_option() -> None:
    """The layer is one as well, but each command takes it in a way of its own."""
    assert {*signature(_options).parameters, "layer"} == {field.name for field in fields(CheckpointOptions)}


@pytest.mark.usefixtures("_block")
def test_all_that_is_missing_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(ARGUMENTS, capsys)
    assert "--depth" in said
    assert "--rope interleaved|half|half-reversed|none" in said
    assert "--rope-theta" in said


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(
    ("option", "attribute"), [("--output-scale", "output_scale"), ("--lambda-init", "lambda_init")]
)
def test_numbers_behind_the_depth_can_be_given(option: str, attribute: str) -> None:
    assert main([*ARGUMENTS, *KNOWN, option, "0.125"]) == 0
    assert getattr(open_bundle("out").manifest.config, attribute) == 0.125


def test_a_prefix_tells_blocks_apart_that_numbers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {
        f"{side}.{name}": tensor.float()
        for seed, side in enumerate(("left", "right"))
        for name, tensor in random_weights(make_config(num_kv_heads=4), seed).items()
    }
    save_file(weights, "block.safetensors")
    assert "choose one with --prefix: left, right" in refused([*ARGUMENTS, *KNOWN], capsys)
    assert main([*ARGUMENTS, *KNOWN, "--prefix", "right"]) == 0
    assert open_bundle("out").manifest.provenance.keys[0].startswith("right.")


def test_the_command_that_measures_again_has_the_options_of_the_checkpoint() -> None:
    request = BenchRequest(
        sources=(Path("block.safetensors"),),
        impl=["all"],
        format=None,
        seq=[8, 16],
        batch=[1],
        embed_dim=None,
        num_heads=None,
        num_kv_heads=None,
        head_dim=None,
        dtype=None,
        device="cpu",
        threads=None,
        graph=None,
        baseline=None,
        rounds=None,
        reading=CheckpointOptions(layer=0, causal=False, sliding_window=0),
    )
    assert request.command == ("diffdeploy bench block.safetensors --seq 8,16 --layer 0 --no-causal --sliding-window 0")
