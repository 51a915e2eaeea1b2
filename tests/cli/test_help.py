"""The help of commands in groups, and what a shell completes."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.checkpoints.layouts import LAYOUTS
from diffdeploy.cli.main import app, main
from diffdeploy.cli.panels import PANELS
from tests.support.commands import COMMAND, refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

GROUP: Any = typer.main.get_command(app)
# With more options than fit one look.
MANY = 8


def options_of(name: str) -> set[str]:
    return {option.name for option in GROUP.commands[name].params if option.param_type_name == "option"}


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_every_option_of_a_large_command_is_in_one_group(name: str) -> None:
    grouped = [option for names in PANELS.get(name, {}).values() for option in names]
    assert len(grouped) == len(set(grouped))
    if name in PANELS or len(options_of(name)) > MANY:
        assert set(grouped) == options_of(name)


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_help_at_80_columns_cuts_nothing(name: str) -> None:
    environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    done = subprocess.run([*COMMAND, name, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    titles = [line[3:].split(" ─")[0].strip() for line in done.stdout.splitlines() if line.startswith("╭─")]
    assert titles[-len(PANELS.get(name, {})) or len(titles) :] == list(PANELS.get(name, {}))


def completed(*words: str) -> list[str]:
    """What bash offers for the last of the words."""
    environment = {
        **os.environ,
        "_DIFFDEPLOY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("diffdeploy", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["export", "--format", "a"], ["aoti", "all"]),
        (["export", "--graph", ""], ["plain", "masked", "cached"]),
        (["export", "--layout", "mic"], ["microsoft", "microsoft-v2"]),
        (["export", "--layer", ""], ["0", "1", "2", "3", "all"]),
        (["verify", "b", "--engine", ""], ["genai", "vllm", "openvino", "reference"]),
        (["bench", "--format", "onnx,p"], ["onnx,pt2"]),
        (["bench", "--impl", "naive,f"], ["naive,four_call", "naive,flash2", "naive,fused"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_shell_completes(words: list[str], offered: list[str]) -> None:
    assert completed(*words) == offered


def test_layers_are_those_of_the_checkpoint_on_the_line() -> None:
    header = json.dumps(
        {f"model.layers.{layer}.self_attn.q_proj.weight": {"dtype": "F32"} for layer in (7, 11)}
    ).encode()
    Path("block.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert completed("export", "block.safetensors", "--layer", "") == ["7", "11", "all"]
    Path("shards").mkdir()
    index = {"weight_map": {"transformer.h.5.attn.c_q.weight": "one.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    assert completed("export", "shards", "--layer", "5") == ["5"]
    # Whatever is on the line, a shell must not be told of errors.
    for odd in ("nowhere", "shards/nowhere.pt"):
        assert completed("export", odd, "--layer", "") == ["all"]
    Path("cut.safetensors").write_bytes(b"\xff" * 9)
    assert completed("export", "cut.safetensors", "--layer", "a") == ["all"]
    assert completed("bench", str(SAMPLE), "--layer", "2") == ["2"]


def test_completion_loads_nothing_heavy() -> None:
    code = (
        "import sys; from diffdeploy.cli import completion as c; import types; "
        "c.complete_layout(''), c.complete_engine(''), c.complete_format(''), "
        "c.complete_layer(types.SimpleNamespace(params={}, args=[]), ''); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


def test_layouts_are_all_of_the_table() -> None:
    from diffdeploy.cli.completion import complete_layout

    assert complete_layout("") == ["auto", *LAYOUTS]


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (["--no-verify", "--cases", "quick"], "--no-verify", "--cases"),
        (["--no-verify", "--seed", "3"], "--no-verify", "--seed"),
        (["--block-size", "64"], "--weights", "--block-size"),
        (["--max-kl", "0.1", "--quantize-head"], "--weights", "--quantize-head, --max-kl"),
        (["--layer", "all", "--format", "all"], "--layer", "--format"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_named_in_one_sentence(
    arguments: list[str], first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["export", *arguments], capsys)
    assert first in message
    assert second in message


def test_the_package_runs_as_a_module() -> None:
    shown = subprocess.run([*COMMAND, "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["diffdeploy", version("diffdeploy")]
    failed = subprocess.run([*COMMAND, "inspect", "nothing"], check=False, capture_output=True, text=True)
    assert failed.returncode == main(["inspect", "nothing"])
    assert failed.stderr.startswith("error: nothing does not exist")
