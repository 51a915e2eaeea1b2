"""No tensor of a block is dropped: it is read, known to be needless, or refused by its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint, summarise
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError

LAYER = "model.layers.2.self_attn."


def block(layout: str) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Shapes by keys behind the prefix, and config.json, of a small block: D 32, h 4, h_kv 2, d 4."""
    rows = {"q": (32, 32), "k": (16, 32), "v": (16, 32)}
    shapes: dict[str, tuple[int, ...]] = {f"lambda_{name}": (4,) for name in ("q1", "k1", "q2", "k2")}
    if layout == "timm":
        return {**shapes, "qkv.weight": (96, 32), "proj.weight": (32, 32), "sub_norm.weight": (8,)}, {}
    shapes |= {f"{name}_proj.weight": shape for name, shape in rows.items()}
    if layout == "microsoft":
        return {**shapes, "out_proj.weight": (32, 32)}, {}
    shapes["o_proj.weight"] = (32, 32)
    if layout == "motif":
        shapes["subln.weight"] = (8,)
    return shapes, {"model_type": layout, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
                    "rope_theta": 100.0}  # fmt: skip


UNREAD = {
    "microsoft": [
        *("q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias", "q_norm.weight", "k_norm.weight", "subln.bias"),
        *("g_proj.weight", "lambda_q3", "sinks", "relative_position_bias_table", "subnorm.weight", "sub_norm.weight"),
        *("norm.weight", "group_norm.weight", "rotary.inv_freq"),
    ],
    "motif": ["q_norm.weight", "k_norm.weight", "subln.bias", "gate.weight"],
    "timm": ["gate.weight", "rel_pos.table", "sub_norm.bias", "q_norm.bias"],
    "diffllama": ["anything.weight", "q_norm.weight", "sinks"],
}


def store(folder: Path, layout: str, extra: list[str]) -> None:
    shapes, fields = block(layout)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    state |= {name: torch.ones(8) for name in extra}
    save_file({LAYER + name: tensor for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))


def options(layout: str) -> CheckpointOptions:
    if layout == "microsoft":
        return CheckpointOptions(rope="none", gqa_layout="canonical")
    return CheckpointOptions()


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, names in UNREAD.items() for name in names], ids=str
)
def test_an_unread_tensor_is_refused_by_its_name(layout: str, name: str, tmp_path: Path) -> None:
    store(tmp_path, layout, [])
    assert read_checkpoint(tmp_path, options(layout)).layout == layout
    store(tmp_path, layout, [name])
    with pytest.raises(InputError) as refused:
        read_checkpoint(tmp_path, options(layout))
    assert name in str(refused.value)


def test_inspect_lists_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path, "microsoft", ["sinks", "g_proj.weight"])
    (found,) = summarise(tmp_path).blocks
    assert found.unread == (f"{LAYER}g_proj.weight", f"{LAYER}sinks")
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"unread       {LAYER}g_proj.weight, {LAYER}sinks; the block cannot be exported with these" in (
        capsys.readouterr().out
    )


def test_what_follows_from_the_config_is_no_loss(tmp_path: Path) -> None:
    store(tmp_path, "diffllama", ["rotary_emb.inv_freq"])
    assert read_checkpoint(tmp_path).layout == "diffllama"


@pytest.mark.parametrize(
    ("layout", "extra", "missing"),
    [
        ("timm", ["q_norm.weight"], "k_norm.weight"),
        ("diffllama", ["q_proj.bias"], "k_proj.bias"),
        ("diffllama", ["k_proj.bias", "v_proj.bias"], "q_proj.bias"),
        ("motif", ["v_proj.bias"], "q_proj.bias"),
    ],
    ids=str,
)
def test_half_of_what_belongs_together_is_bad_input(
    layout: str, extra: list[str], missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path, layout, extra)
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"lacks {LAYER}{missing}" in said
    assert "a block has all of these or none" in said
