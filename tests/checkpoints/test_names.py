"""Whole models whose tensors have names of nobody's code base, read by a table of names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import CheckpointOptions, holds_model, read_checkpoint, read_model
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError
from diffdeploy.modules import DiffTransformer
from tests.checkpoints.test_whole_models import diffllama
from tests.support.commands import refused

NAMES = {
    "embedding": "transformer.wte.weight",
    "layer": "transformer.h.{}.",
    "attention": "attn.",
    "norm": "transformer.ln_f.weight",
    "head": "score.weight",
    "attention_norm.weight": "ln_1.weight",
    "ffn_norm.weight": "ln_2.weight",
    "ffn.gate_proj.weight": "mlp.w1.weight",
    "ffn.up_proj.weight": "mlp.w3.weight",
    "ffn.down_proj.weight": "mlp.w2.weight",
}
RENAMED = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "model.norm.": "transformer.ln_f.",
    "lm_head.": "score.",
    ".self_attn.": ".attn.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".mlp.gate_proj.": ".mlp.w1.",
    ".mlp.up_proj.": ".mlp.w3.",
    ".mlp.down_proj.": ".mlp.w2.",
}


def renamed(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A DiffLlama under other names, with token ids and the logits of transformers."""
    folder = tmp_path / "checkpoint"
    _, ids, logits = diffllama(folder)
    file = folder / "model.safetensors"
    save_file({renamed(key): tensor for key, tensor in load_file(file).items()}, file)
    return folder, ids, logits


def with_names(**changes: Any) -> CheckpointOptions:
    return CheckpointOptions(names=json.dumps({**NAMES, **changes}))


def test_the_logits_are_those_of_transformers(model: tuple[Path, Any, Any]) -> None:
    folder, ids, logits = model
    assert not holds_model(folder)
    assert holds_model(folder, with_names().names)
    found = read_model(folder, with_names())
    decoder = DiffTransformer.from_weights(found.config, found.weights, dtype=torch.float64, max_positions=64)
    torch.testing.assert_close(decoder(ids), logits.double(), rtol=0, atol=2e-4)
    assert CheckpointOptions.from_given(found.options.given()) == found.options


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an object of strings"),
        (json.dumps({**NAMES, "norm": 3}), "is not an object of strings"),
        (json.dumps({**NAMES, "final_norm": "x"}), "has final_norm; accepted: embedding, layer"),
        (json.dumps({k: v for k, v in NAMES.items() if k not in ("norm", "ffn.up_proj.weight")}),
         "lacks norm, ffn.up_proj.weight"),
        (json.dumps({**NAMES, "layer": "transformer.h."}), "accepted: a prefix with one {} in it"),
        (json.dumps({**NAMES, "embedding": "wte.weight"}), "the embedding is wte.weight in the table of names"),
        (json.dumps({**NAMES, "ffn_norm.weight": "ln_3.weight"}), r"lacks transformer.h.0.ln_3.weight"),
        (json.dumps({**NAMES, "attention": "self_attn."}), "has no block of layout diffllama at transformer.h.0.self"),
    ],
    ids=["broken", "list", "number", "unknown", "absent", "no number", "no embedding", "no norm", "no block"],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(names: str, message: str, model: tuple[Path, Any, Any]) -> None:
    with pytest.raises(InputError, match=message):
        read_model(model[0], CheckpointOptions(names=names))


def test_nothing_is_dropped(model: tuple[Path, Any, Any]) -> None:
    file = model[0] / "model.safetensors"
    save_file({**load_file(file), "transformer.h.0.more": torch.ones(3)}, file)
    with pytest.raises(InputError, match=r"contains transformer.h.0.more, .* with the names given"):
        read_model(model[0], with_names())


def test_a_block_needs_no_names(model: tuple[Path, Any, Any]) -> None:
    assert read_checkpoint(model[0], CheckpointOptions(layer=1)).layer == 1
    with pytest.raises(InputError, match="names are for a whole model"):
        read_checkpoint(model[0], CheckpointOptions(layer=1, names=json.dumps(NAMES)))


@pytest.mark.slow
def test_the_command_line_takes_a_file(
    model: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.json").write_text(json.dumps(NAMES, indent=2))
    sizes = ["--max-sequence-length", "16", "--max-batch-size", "2", "--cases", "1"]
    command = ["export", str(model[0]), "--names", "names.json", "--output", "out", *sizes]
    assert main(command) == 0
    assert open_bundle("out").manifest.graph.variant == "model"
    assert main(["verify", "out", "--checkpoint", str(model[0]), "--cases", "1"]) == 0
    capsys.readouterr()
    assert "--names nowhere.json cannot be read" in refused(
        ["export", str(model[0]), "--names", "nowhere.json", "--output", "more"], capsys
    )
