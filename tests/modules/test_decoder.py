"""The decoder against a formula of its own, its cache, its padding, and transformers' DiffLlama."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdeploy.config import DecoderConfig, DiffAttentionV2Config, LayerConfig, MlpConfig
from diffdeploy.errors import InputError
from diffdeploy.modules import DiffTransformer
from diffdeploy.modules.block import KeyValueCache
from tests.oracles import Array, block
from tests.support.blocks import ROPE, make_config
from tests.support.models import decoder_weights, make_decoder


def rms(x: Array, weight: Array, eps: float) -> Array:
    scaled: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight
    return scaled


def poly(z: Array, w: Array, b: Array) -> Array:
    parts = [w[i] * rms(z ** (3 - i), np.ones(1), 1e-6) for i in range(3)]
    total: Array = sum(parts) + b
    return total


def formula(config: DecoderConfig, weights: dict[str, Array], ids: Any) -> Array:
    """Logits of one sequence."""
    x = weights["embedding.weight"][ids]
    for number, layer in enumerate(config.layers):
        w = {name.removeprefix(f"layers.{number}."): array for name, array in weights.items()}
        attention = layer.attention
        assert attention.version == 1
        assert attention.rope is not None
        attended = block(
            rms(x, w["attention_norm.weight"], config.norm_eps),
            {name.removeprefix("self_attn."): array for name, array in w.items()},
            heads=attention.num_heads,
            kv_heads=attention.num_kv_heads,
            lambda_init=attention.lambda_init,
            causal=True,
            rope=(attention.rope.style, attention.rope.theta),
        )
        x = x + attended
        y = rms(x, w["ffn_norm.weight"], config.norm_eps)
        gate, up = (y @ w[f"ffn.{n}_proj.weight"].T + w.get(f"ffn.{n}_proj.bias", 0.0) for n in ("gate", "up"))
        if layer.mlp.kind == "polynorm":
            act = poly(gate, w["ffn.act.weight"], w["ffn.act.bias"])
        else:
            act = gate / (1 + np.exp(-gate))
        x = x + (act * up) @ w["ffn.down_proj.weight"].T + w.get("ffn.down_proj.bias", 0.0)
    x = rms(x, weights["norm.weight"], config.norm_eps)
    logits: Array = x @ weights["embedding.weight" if config.tied else "lm_head.weight"].T
    return logits


CONFIGS = {
    "plain": make_decoder(),
    "tied-polynorm": make_decoder(tied=True, mlp=MlpConfig(hidden_dim=40, kind="polynorm")),
    "biases": make_decoder(
        mlp=MlpConfig(hidden_dim=40, bias=True),
        attention=make_config(lambda_init=0.3, output_scale=0.7, qkv_bias=True, out_bias=True, rope=ROPE),
    ),
}


def model_of(config: DecoderConfig, dtype: torch.dtype = torch.float64, **options: Any) -> DiffTransformer:
    return DiffTransformer.from_weights(config, decoder_weights(config), dtype=dtype, **options)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 53, (batch, length), generator=torch.Generator().manual_seed(seed))


def empty_caches(config: DecoderConfig, batch: int) -> list[KeyValueCache]:
    attention = config.attention
    shapes = [(batch, attention.num_kv_heads, 0, w) for w in (attention.key_cache_dim, attention.value_dim)]
    return [
        (torch.empty(shapes[0], dtype=torch.float64), torch.empty(shapes[1], dtype=torch.float64))
    ] * config.num_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formula(name: str) -> None:
    config = CONFIGS[name]
    weights = {key: tensor.numpy() for key, tensor in decoder_weights(config).items()}
    ids = tokens(2, 9)
    logits = model_of(config)(ids)
    for row in range(2):
        np.testing.assert_allclose(logits[row], formula(config, weights, ids[row].numpy()), rtol=0, atol=1e-10)


def test_a_window_of_one_layer_is_that_layer_s() -> None:
    wide = make_decoder(num_layers=2)
    narrow = replace(wide.layers[1].attention, sliding_window=3)
    config = replace(wide, layers=(wide.layers[0], LayerConfig(attention=narrow, mlp=wide.layers[1].mlp)))
    ids = tokens(1, 9)
    assert not torch.allclose(model_of(config)(ids)[:, 3:], model_of(wide)(ids)[:, 3:])
    torch.testing.assert_close(model_of(config)(ids)[:, :3], model_of(wide)(ids)[:, :3])


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 4)])
def test_a_sequence_in_steps_gives_what_one_pass_gives(chunks: tuple[int, ...]) -> None:
    config, ids = CONFIGS["plain"], tokens(2, 9)
    model, caches, start, steps = model_of(config), empty_caches(config, 2), 0, []
    for size in chunks:
        mask = torch.ones(2, start + size, dtype=torch.int64)
        logits, caches = model(ids[:, start : start + size], mask, past_key_values=caches)
        steps.append(logits)
        start += size
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=0, atol=1e-12)
    assert [tuple(side.shape) for side in caches[2]] == [(2, 2, 9, 12), (2, 2, 9, 12)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_token(side: str) -> None:
    config, ids = CONFIGS["plain"], tokens(2, 9)
    model = model_of(config)
    mask = torch.ones(2, 9, dtype=torch.int64)
    kept = slice(4, 9) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, kept] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, mask, positions)
    torch.testing.assert_close(padded[0, kept], model(ids[:1, kept])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(padded[1], model(ids[1:])[0], rtol=0, atol=1e-12)


def test_the_last_position_alone_is_the_last_of_all() -> None:
    model, ids = model_of(CONFIGS["plain"]), tokens(2, 5)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = DiffTransformer(make_decoder(tied=True, num_layers=1), max_positions=16)
    ids = tokens(1, 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    # Moved and cast, the tables are those of the new dtype and the head is still the embedding.
    half = model.to(torch.bfloat16)
    assert half.lm_head.weight is half.embedding.weight
    assert half(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_comes_near_float64(dtype: torch.dtype) -> None:
    config, ids = CONFIGS["tied-polynorm"], tokens(2, 9)
    exact = model_of(config)(ids)
    error = (model_of(config, dtype)(ids).double() - exact).abs().max() / exact.abs().max()
    assert error < 40 * torch.finfo(dtype).eps


def test_the_second_version_makes_a_decoder_too() -> None:
    attention = DiffAttentionV2Config(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, rope=ROPE)
    config, ids = make_decoder(attention=attention), tokens(2, 6)
    model = model_of(config)
    logits, caches = model(ids, torch.ones(2, 6, dtype=torch.int64), past_key_values=empty_caches(config, 2))
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-12)
    assert caches[0][0].shape == caches[0][1].shape == (2, 2, 6, 6)


def test_layers_of_other_kinds_are_refused_by_name() -> None:
    config = make_decoder()
    odd = LayerConfig(attention=make_config(norm_eps=1e-3, rope=ROPE), mlp=config.layers[0].mlp)
    with pytest.raises(InputError, match="layer 3 differs from layer 0 in its norm_eps"):
        replace(config, layers=(*config.layers, odd))
    with pytest.raises(InputError, match="causal of layer 0"):
        make_decoder(attention=make_config(causal=False, rope=None))
    with pytest.raises(InputError, match=r"mlp\.kind"):
        MlpConfig(hidden_dim=4, kind="relu")  # type: ignore[arg-type]


def test_a_past_needs_a_mask_and_every_layer() -> None:
    config = CONFIGS["plain"]
    model, ids = model_of(config), tokens(1, 2)
    with pytest.raises(InputError, match="needs an attention_mask"):
        model(ids, past_key_values=empty_caches(config, 1))
    with pytest.raises(InputError, match="has 2 layers; accepted: 3"):
        model(ids, torch.ones(1, 2, dtype=torch.int64), past_key_values=empty_caches(config, 1)[:2])


def test_weights_are_shared_not_copied() -> None:
    config = CONFIGS["tied-polynorm"]
    weights = {name: tensor.float() for name, tensor in decoder_weights(config).items()}
    assert "lm_head.weight" not in weights
    model = DiffTransformer.from_weights(config, weights)
    assert model.lm_head.weight.data_ptr() == weights["embedding.weight"].data_ptr()
    assert model.layers[1].self_attn.q_proj.weight.data_ptr() == weights["layers.1.self_attn.q_proj.weight"].data_ptr()
    assert len({layer.self_attn.rotary for layer in model.layers}) == 1


def test_a_batch_as_large_as_the_number_of_heads_compiles() -> None:
    config, ids = CONFIGS["plain"], tokens(2, 3)
    assert config.attention.num_kv_heads == len(ids)
    model, mask = model_of(config), torch.ones(2, 3, dtype=torch.int64)

    def run(ids: Tensor, mask: Tensor, *sides: Tensor) -> Tensor:
        caches = list(zip(sides[::2], sides[1::2], strict=True))
        logits: Tensor = model(ids, mask, past_key_values=caches)[0]
        return logits

    sides = [side for cache in empty_caches(config, 2) for side in cache]
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(ids, mask, *sides), model(ids))
