"""Further code bases, each against its own formula in loops: whole blocks, read from files and written back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint, summarise, write_checkpoint
from diffdeploy.errors import InputError
from diffdeploy.modules import block_class
from tests import layout_formulas as formulas

LENGTH = 7
Shapes = Mapping[str, tuple[int, ...]]


def lambdas(width: int) -> dict[str, tuple[int, ...]]:
    return {f"lambda_{name}": (width,) for name in ("q1", "k1", "q2", "k2")}


def projections(q: int, k: int, v: int, output: str, embed_dim: int, columns: int) -> dict[str, tuple[int, ...]]:
    rows = {f"{name}_proj.weight": (count, embed_dim) for name, count in zip("qkv", (q, k, v), strict=True)}
    return {**rows, f"{output}.weight": (embed_dim, columns)}


def random_state(shapes: Shapes, prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        for name, shape in shapes.items()
    }


def read(
    folder: Path, state: Mapping[str, Tensor], fields: object = None, options: CheckpointOptions | None = None
) -> Checkpoint:
    save_file(dict(state), folder / "model.safetensors")
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(fields))
    return read_checkpoint(folder, options)


def compare(found: Checkpoint, state: Mapping[str, Tensor], prefix: str, formula: Callable[..., Any]) -> None:
    """The canonical block in fp64 against the source's formula."""
    x = torch.randn(2, LENGTH, found.config.embed_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    block = block_class(found.config).from_weights(
        found.config, found.weights, max_positions=LENGTH, dtype=torch.float64
    )
    weights = {name.removeprefix(prefix): tensor.numpy() for name, tensor in state.items()}
    expected = np.stack([formula(row.numpy(), weights) for row in x])
    np.testing.assert_allclose(block(x).numpy(), expected, rtol=0, atol=1e-10)


def same_bits(written: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


DIFFCLIP = {
    **projections(24, 24, 24, "out_proj", 24, 24),
    **lambdas(4),
    "diff_norm.weight": (8,),
    **{f"{name}_proj.bias": (24,) for name in ("q", "k", "v", "out")},
}


@pytest.mark.parametrize(
    ("prefix", "options", "causal"),
    [
        ("visual.blocks.1.attn.", CheckpointOptions(), False),
        ("transformer.resblocks.1.attn.", CheckpointOptions(), True),
        ("", CheckpointOptions(causal=False), False),
        ("", CheckpointOptions(causal=True), True),
    ],
    ids=["vision", "text", "bare", "bare-causal"],
)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_diffclip(prefix: str, options: CheckpointOptions, causal: bool, biases: bool, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in DIFFCLIP.items() if biases or name[:2] not in ("q_", "k_", "v_")}
    shapes |= {name: DIFFCLIP[name] for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")}
    state = random_state(shapes, prefix)
    found = read(tmp_path, state, options=options)
    assert (found.layout, found.config.causal, found.config.lambda_init) == ("diffclip", causal, 0.8)
    compare(found, state, prefix, lambda x, w: formulas.diffclip(x, w, num_heads=6, causal=causal))
    assert same_bits(write_checkpoint(found.config, found.weights, "diffclip", prefix=prefix), state)


def test_a_bare_block_of_diffclip_is_asked_for_causality(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--causal or --no-causal is missing"):
        read(tmp_path, random_state(DIFFCLIP))
    (block,) = summarise(tmp_path).blocks
    assert block.lambda_init == 0.8


def grouped_shapes(noise: int, ratio: int, pairs: int, width: int, embed_dim: int) -> dict[str, tuple[int, ...]]:
    rows = (noise * (ratio + 1) * width, 2 * pairs * width, 2 * pairs * width)
    return {
        **projections(*rows, "o_proj", embed_dim, 2 * noise * ratio * width),
        **lambdas(width),
        "subln.weight": (2 * width,),
    }


@pytest.mark.parametrize(("noise", "ratio", "pairs"), [(2, 4, 2), (4, 2, 2), (3, 1, 3), (2, 3, 1)], ids=str)
def test_groups_of_motif(noise: int, ratio: int, pairs: int, tmp_path: Path) -> None:
    heads, prefix = noise * (ratio + 1), "model.layers.3.self_attn."
    fields = {
        "model_type": "motif",
        "num_attention_heads": heads,
        "num_noise_heads": noise,
        "num_key_value_heads": 2 * pairs,
        "head_dim": 4,
        "rope_theta": 100.0,
        "attn_rms_norm_eps": 1e-5,
    }
    state = random_state(grouped_shapes(noise, ratio, pairs, 4, 20), prefix)
    found = read(tmp_path, state, fields)
    assert (found.layout, found.config.num_heads, found.config.num_kv_heads) == ("motif", noise * ratio, pairs)

    def formula(x: Any, w: Any) -> Any:
        return formulas.grouped(x, w, num_heads=heads, noise_heads=noise, kv_pairs=pairs, width=4, theta=100.0, layer=3)

    compare(found, state, prefix, formula)
    written = write_checkpoint(found.config, found.weights, "motif", prefix=prefix, noise_repeat=ratio)
    assert same_bits(written, state)
    if ratio > 1:
        found.weights["q_proj.weight"][4] += 1.0
        with pytest.raises(InputError, match="cannot share one noise query"):
            write_checkpoint(found.config, found.weights, "motif", noise_repeat=ratio)
        with pytest.raises(InputError, match="no heads that share"):
            write_checkpoint(found.config, found.weights, "microsoft", noise_repeat=ratio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_noise_heads": 3}, "num_noise_heads in config.json is 3"),
        ({"num_noise_heads": 0}, "num_noise_heads in config.json is 0"),
        ({"num_noise_heads": 10}, "num_noise_heads in config.json is 10"),
        ({"num_attention_heads": None}, "without num_attention_heads"),
        ({"num_noise_heads": 5}, "num_kv_heads is 2"),
        ({"k_ratio": 2}, "k_ratio in config.json is 2"),
        ({"num_attention_heads": 12}, "rows|num_attention_heads"),
    ],
    ids=str,
)
def test_groups_that_do_not_fit_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    fields = {"model_type": "motif", "num_attention_heads": 10, "num_noise_heads": 2, "rope_theta": 100.0, **changes}
    with pytest.raises(InputError, match=message):
        read(tmp_path, random_state(grouped_shapes(2, 4, 2, 4, 20), "model.layers.3.self_attn."), fields)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (8, 4)], ids=str)
def test_axolotl(heads: int, kv_heads: int, tmp_path: Path) -> None:
    shapes = {
        **projections(4 * heads, 4 * kv_heads, 4 * kv_heads, "o_proj", 20, 4 * heads),
        **lambdas(4),
        "subln.weight": (8,),
    }
    prefix = "model.layers.2.self_attn."
    state = {**random_state(shapes, prefix), prefix + "lambda_init": torch.tensor(0.37)}
    fields = {
        "model_type": "llama-differential",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-6,
        "split_heads": True,
    }
    found = read(tmp_path, state, fields)
    assert (found.layout, found.config.lambda_init) == ("axolotl", float(torch.tensor(0.37)))
    assert prefix + "lambda_init" in found.keys

    def formula(x: Any, w: Any) -> Any:
        return formulas.axolotl_split(x, w, num_heads=heads, num_kv_heads=kv_heads, theta=100.0, eps=1e-6)

    compare(found, state, prefix, formula)
    assert same_bits(write_checkpoint(found.config, found.weights, "axolotl", prefix=prefix), state)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)], ids=str)
def test_doubled_projections_of_axolotl(heads: int, kv_heads: int, norm: bool, tmp_path: Path) -> None:
    shapes = {
        **projections(8 * heads, 8 * kv_heads, 4 * kv_heads, "o_proj", 20, 4 * heads),
        **lambdas(4),
        **({"subln.weight": (4,)} if norm else {}),
    }
    prefix = "model.layers.2.self_attn."
    state = {**random_state(shapes, prefix), prefix + "lambda_init": torch.tensor(0.37)}
    fields = {
        "model_type": "llama-differential",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-6,
        "split_heads": False,
        "sublayer_norm": norm,
    }
    found = read(tmp_path, state, fields)
    assert (found.config.num_heads, found.config.value_dim, found.config.has_norm) == (heads, 4, norm)

    def formula(x: Any, w: Any) -> Any:
        return formulas.axolotl_doubled(x, w, num_heads=heads, num_kv_heads=kv_heads, theta=100.0, eps=1e-6)

    compare(found, state, prefix, formula)
    assert same_bits(write_checkpoint(found.config, found.weights, "axolotl", prefix=prefix), state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split_heads": False}, "split_heads is False, but the block has True"),
        ({"sublayer_norm": False}, "sublayer_norm is False, but the block has True"),
    ],
    ids=str,
)
def test_modes_of_axolotl_that_contradict_the_tensors(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    shapes = {**projections(24, 24, 24, "o_proj", 20, 24), **lambdas(4), "subln.weight": (8,), "lambda_init": ()}
    state = random_state(shapes, "layers.0.attn.")
    with pytest.raises(InputError, match=message):
        read(tmp_path, state, {"model_type": "llama-differential", **fields})


REPLAY = {
    **{f"{name}.weight": (rows, 20) for name, rows in (("W_q", 32), ("W_k", 32), ("W_v", 12))},
    **{f"{name}.bias": (rows,) for name, rows in (("W_q", 32), ("W_k", 32), ("W_v", 12), ("W_o", 20))},
    "W_o.weight": (20, 12),
    **{f"lambda_{name}": (2, 8) for name in ("q1", "k1", "q2", "k2")},
    "rms_scale": (6,),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
def test_replay(causal: bool, biases: bool, tmp_path: Path) -> None:
    prefix = "model.layers.1.attn."
    state = random_state({name: shape for name, shape in REPLAY.items() if biases or "bias" not in name}, prefix)
    # As the source stores it: rounded to float32.
    state[prefix + "scaling"] = torch.tensor(8**-0.5, dtype=torch.float32)
    found = read(tmp_path, state, options=CheckpointOptions(causal=causal))
    assert (found.layout, found.config.lambda_kind, found.config.value_dim) == ("replay", "head", 6)
    assert found.config.scale == float(torch.tensor(8**-0.5)) != 8**-0.5
    hidden = formulas.causal_mask(LENGTH) if causal else formulas.no_mask(LENGTH)

    def formula(x: Any, w: Any) -> Any:
        return formulas.replay(x, w, num_heads=2, lambda_init=formulas.decay(1), hidden=hidden)

    compare(found, state, prefix, formula)
    assert same_bits(write_checkpoint(found.config, found.weights, "replay", prefix=prefix), state)


def test_a_block_of_replay_is_asked_for_what_its_file_does_not_say(tmp_path: Path) -> None:
    state = {**random_state(REPLAY), "scaling": torch.tensor(8**-0.5)}
    with pytest.raises(InputError, match=r"2 options are missing: --depth.*; --causal or --no-causal"):
        read(tmp_path, state)
    (block,) = summarise(tmp_path).blocks
    assert (block.value_dim, block.lambda_value) == (6, None)


BLAGPT = {**projections(32, 16, 16, "out_proj", 20, 32), **lambdas(4), "subln.weight": (8,)}


@pytest.mark.parametrize("layout", ["blagpt", "microsoft"])
def test_blagpt(layout: str, tmp_path: Path) -> None:
    prefix = "transformer.h.3.attn."
    state = random_state(BLAGPT, prefix)
    options = CheckpointOptions(layout="blagpt")
    if layout == "microsoft":
        options = CheckpointOptions(rope="half-reversed", rope_theta=10_000.0, gqa_layout="canonical")
    found = read(tmp_path, state, options=options)
    assert (found.layout, found.config.causal) == (layout, True)

    def formula(x: Any, w: Any) -> Any:
        return formulas.blagpt(x, w, num_heads=4, num_kv_heads=2, depth=3, theta=10_000.0)

    compare(found, state, prefix, formula)
    assert same_bits(write_checkpoint(found.config, found.weights, "blagpt", prefix=prefix), state)


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "no-norms"])
def test_the_second_version_of_blagpt(norms: bool, tmp_path: Path) -> None:
    shapes = {
        "q_proj.weight": (32, 20),
        "kv_proj.weight": (16, 20),
        "c_proj.weight": (20, 16),
        "lambda_proj.weight": (4, 20),
        **({"q_norm.weight": (4,), "k_norm.weight": (4,)} if norms else {}),
    }
    prefix = "transformer.h.3.attn."
    state = random_state(shapes, prefix)
    found = read(tmp_path, state)
    assert (found.layout, found.config.qk_norm_eps) == ("blagpt-v2", 1e-8 if norms else None)

    def formula(x: Any, w: Any) -> Any:
        return formulas.blagpt_v2(x, w, num_heads=4, num_kv_heads=2, theta=10_000.0, norm_eps=1e-8)

    compare(found, state, prefix, formula)
    assert same_bits(write_checkpoint(found.config, found.weights, "blagpt-v2", prefix=prefix), state)


STABLE_AUDIO = {
    "to_qkv.weight": (5 * 96, 96),
    "to_out.weight": (96, 96),
    "q_norm.weight": (48,),
    "k_norm.weight": (48,),
}


def test_stable_audio(tmp_path: Path) -> None:
    prefix = "model.transformer.layers.2.self_attn."
    state = random_state(STABLE_AUDIO, prefix)
    found = read(tmp_path, state)
    config = found.config
    assert (found.layout, config.lambda_kind, config.has_norm, config.value_dim) == ("stable-audio", "fixed", False, 48)
    compare(found, state, prefix, lambda x, w: formulas.stable_audio(x, w, num_heads=2))
    assert same_bits(write_checkpoint(config, found.weights, "stable-audio", prefix=prefix), state)
    (block,) = summarise(tmp_path).blocks
    assert (block.norm, block.lambda_value) == ("none", 1.0)


def test_ordinary_attention_is_not_taken_for_stable_audio(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"to_qkv.weight has 288 rows; accepted: the rows of q, k, v, q_noise, k_noise"
    ):
        read(tmp_path, random_state({**STABLE_AUDIO, "to_qkv.weight": (288, 96)}))


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_heads_without_a_norm(scale: float, tmp_path: Path) -> None:
    state = random_state({**projections(24, 24, 24, "out_proj", 24, 24), **lambdas(4)}, "blocks.1.attn.")
    options = CheckpointOptions(causal=False, norm="none", rope="none", gqa_layout="canonical")
    with pytest.raises(InputError, match="--output-scale is missing: without a norm, nothing shows"):
        read(tmp_path, state, options=options)
    found = read(tmp_path, state, options=replace(options, output_scale=scale))
    assert not found.config.has_norm

    def formula(x: Any, w: Any) -> Any:
        lam = formulas.exponent(w, 1) - formulas.exponent(w, 2) + formulas.decay(1)
        return formulas.without_norm(x, w, num_heads=3, lam=lam) * scale

    compare(found, state, "blocks.1.attn.", formula)
    with pytest.raises(InputError, match="has_norm is True in layout microsoft, but False in the block"):
        write_checkpoint(replace(found.config, causal=True), found.weights, "microsoft")


def test_a_norm_with_a_weight_cannot_be_left_out(tmp_path: Path) -> None:
    state = random_state({**projections(24, 24, 24, "out_proj", 24, 24), **lambdas(4), "subln.weight": (8,)})
    with pytest.raises(InputError, match=r"--norm is none, but the block has subln.weight"):
        read(tmp_path, state, options=CheckpointOptions(norm="none", depth=1, rope="none", output_scale=1.0))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_vision_blocks_with_the_keys_of_microsoft(norm: Any, tmp_path: Path) -> None:
    prefix = "transformer_blocks.1.attn."
    state = random_state({**projections(24, 24, 24, "out_proj", 24, 24), **lambdas(4)}, prefix)
    options = CheckpointOptions(causal=False, norm=norm, rope="none", gqa_layout="canonical")
    found = read(tmp_path, state, options=options)
    compare(found, state, prefix, lambda x, w: formulas.differential_vit(x, w, num_heads=3, depth=1, norm=norm))


def test_a_layer_norm_in_half_precision_keeps_what_centring_needs(tmp_path: Path) -> None:
    state = random_state({**projections(24, 24, 24, "out_proj", 24, 24), **lambdas(4)}, "blocks.1.attn.")
    options = CheckpointOptions(causal=False, norm="layer", rope="none", gqa_layout="canonical")
    found = read(tmp_path, {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, options=options)
    assert found.weights["v_proj.weight"].dtype == torch.float32
    assert found.weights["q_proj.weight"].dtype == torch.bfloat16
    heads = found.weights["v_proj.weight"].reshape(3, 8, 24)
    assert heads.mean(dim=1).abs().max() < 1e-7


def test_a_block_without_a_norm_has_no_kind_of_norm(tmp_path: Path) -> None:
    shapes = {**projections(24, 12, 12, "o_proj", 24, 12), "lambda_proj.weight": (3, 24)}
    state = random_state({**shapes, "o_proj.weight": (24, 12)})
    with pytest.raises(InputError, match="--norm is layer, but blocks of layout microsoft-v2 have no norm"):
        read(tmp_path, state, options=CheckpointOptions(norm="layer", rope="none"))
