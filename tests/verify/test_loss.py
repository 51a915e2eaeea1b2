"""The loss from quantised weights, held against the formula in numpy fp64."""

from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.arrays import Array
from diffdeploy.bundle import Quantisation
from diffdeploy.graphs import graph_spec
from diffdeploy.modules import DiffTransformer
from diffdeploy.verify import WINDOW, measure_loss
from diffdeploy.verify.activations import quantised_inputs
from diffdeploy.verify.decoder import below, exact_embedding, exact_head, exact_layer, exact_outputs, inputs_of_layer
from diffdeploy.verify.loss import Loss
from tests.support.models import decoder_weights, make_decoder

CONFIG = make_decoder(num_layers=2, vocab_size=11)
SPEC = graph_spec("model", CONFIG, dtype="float32", max_batch_size=2, max_sequence_length=WINDOW)


def eager(weights: dict[str, torch.Tensor]) -> DiffTransformer:
    return DiffTransformer.from_weights(CONFIG, weights, impl="naive", max_positions=WINDOW)


def arrays_of(weights: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in weights.items()}


def inputs_for(tokens: Array) -> dict[str, Array]:
    """A graph's inputs without padding and past."""
    inputs = {"input_ids": tokens[None], "attention_mask": np.ones((1, len(tokens)), np.int64)}
    inputs["position_ids"] = np.arange(len(tokens))[None]
    block = CONFIG.attention
    for number in range(CONFIG.num_layers):
        for side, width in (("key", block.key_cache_dim), ("value", block.value_dim)):
            inputs[f"past_key_values.{number}.{side}"] = np.empty((1, block.num_kv_heads, 0, width))
    return inputs


def log_probabilities(weights: dict[str, Array], tokens: Array) -> Array:
    logits = exact_outputs(CONFIG, weights, inputs_for(tokens), SPEC)["logits"][0]
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def layer_errors(before: dict[str, Array], after: dict[str, Array], windows: list[Array]) -> dict[str, float]:
    squares: dict[str, list[float]] = {}
    for tokens in windows:
        inputs = inputs_for(tokens)
        x = exact_embedding(before, inputs)
        for number, layer in enumerate(CONFIG.layers):
            given, prefix = inputs_of_layer(inputs, number), f"layers.{number}."
            exact, found = (exact_layer(layer, CONFIG.norm_eps, below(w, prefix), x, given)[0] for w in (before, after))
            held = squares.setdefault(f"layer{number}", [0.0, 0.0])
            held[0] += float(((found - exact) ** 2).sum())
            held[1] += float(((exact - x) ** 2).sum())
            x = exact
        # The norm before the head is that of both.
        exact, found = (exact_head(CONFIG, w, x) for w in (before, after))
        held = squares.setdefault("head", [0.0, 0.0])
        held[0] += float(((found - exact) ** 2).sum())
        held[1] += float((exact**2).sum())
    return {name: (error / size) ** 0.5 for name, (error, size) in squares.items()}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 40, WINDOW, WINDOW + 1, 2 * WINDOW + 9])
def test_all_figures_are_those_of_the_formula(num_tokens: int, head: bool) -> None:
    weights = decoder_weights(CONFIG)
    noise = torch.Generator().manual_seed(5)
    coarse = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype)
        if "_proj" in name or (head and name == "lm_head.weight")
        else tensor
        for name, tensor in weights.items()
    }
    tokens = np.random.default_rng(num_tokens).integers(0, CONFIG.vocab_size, num_tokens)
    loss = measure_loss(eager(weights), eager(coarse), tokens.tolist(), b"x" * 100, "a text")
    before, after = arrays_of(weights), arrays_of(coarse)
    # Every token but the first once: windows share a token.
    windows = [tokens[start : start + WINDOW] for start in range(0, num_tokens - 1, WINDOW - 1)]
    assert sum(len(window) - 1 for window in windows) == num_tokens - 1 == loss.num_tokens
    exact, found = (np.concatenate([log_probabilities(w, t)[:-1] for t in windows]) for w in (before, after))
    following = np.concatenate([window[1:] for window in windows])
    for given, said in ((exact, loss.original_bits_per_byte), (found, loss.bits_per_byte)):
        bits = -given[np.arange(len(following)), following].sum() / np.log(2) / 100
        assert said == pytest.approx(bits, rel=1e-3)
    assert loss.kl == pytest.approx((np.exp(exact) * (exact - found)).sum(-1).mean(), rel=2e-3)
    assert loss.agreement == pytest.approx((exact.argmax(-1) == found.argmax(-1)).mean(), rel=1e-3)
    expected = layer_errors(before, after, windows)
    if not head:
        expected.pop("head")
    assert loss.layers == pytest.approx(expected, rel=2e-3)
    assert loss.worst_layer == max(expected, key=lambda name: expected[name])


def test_quantised_activations_are_part_of_the_loss() -> None:
    weights, how = decoder_weights(CONFIG), Quantisation(weights="int8", block_size=16, head=True, accuracy_level=4)
    tokens, after = np.random.default_rng(5).integers(0, CONFIG.vocab_size, WINDOW), eager(weights)
    with quantised_inputs(after, how):
        loss = measure_loss(eager(weights), after, tokens.tolist(), b"x" * 100, "a text")
    # The matrices are those of the original, so all of the loss comes from their inputs.
    arrays = arrays_of(weights)
    logits = [exact_outputs(CONFIG, arrays, inputs_for(tokens), SPEC, each)["logits"][0][:-1] for each in (None, how)]
    exact, found = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in logits)
    bits = -found[np.arange(len(found)), tokens[1:]].sum() / np.log(2) / 100
    assert loss.bits_per_byte == pytest.approx(bits, rel=1e-3)
    # Some numbers are rounded differently in float32, which moves a mean by little.
    assert loss.kl == pytest.approx((np.exp(exact) * (exact - found)).sum(-1).mean(), rel=0.05)
    assert loss.kl > 1e-6
    assert all(error > 1e-3 for error in loss.layers.values())


def test_the_same_weights_lose_nothing() -> None:
    weights = decoder_weights(CONFIG)
    loss = measure_loss(eager(weights), eager(weights), list(range(11)), b"text", "a text")
    assert (loss.kl, loss.agreement, set(loss.layers.values())) == (0.0, 1.0, {0.0})
    assert loss.bits_per_byte == loss.original_bits_per_byte


@pytest.mark.parametrize(
    ("max_kl", "min_agreement", "clause"),
    [
        (None, None, None),
        (0.2, 0.9, None),
        (0.1, None, None),
        (0.09, None, "KL is 0.1 nats per token, but the limit is 0.09"),
        (None, 0.96, "the top token is the same for 0.95 of all tokens, but the minimum is 0.96"),
    ],
)
def test_limits(max_kl: float | None, min_agreement: float | None, clause: str | None) -> None:
    figures: dict[str, Any] = {"original_bits_per_byte": 1.0, "bits_per_byte": 1.1, "agreement": 0.95, "kl": 0.1}
    loss = Loss(
        text="a text", text_sha256="0", num_bytes=9, num_tokens=8, layers={"layer0": 0.2, "head": 0.1}, **figures
    )
    said = loss.excess(max_kl, min_agreement)
    assert said is None if clause is None else said is not None and said.startswith(clause)
    assert "worst layer layer0, off by 20.00%" in loss.summary
    assert "8 tokens of a text" in loss.summary


def test_a_divergence_without_a_number_is_beyond_every_limit() -> None:
    figures: dict[str, Any] = {"original_bits_per_byte": 1.0, "bits_per_byte": 1.1, "agreement": 0.95}
    loss = Loss(
        text="a text", text_sha256="0", num_bytes=9, num_tokens=8, layers={"layer0": 0.2}, kl=float("nan"), **figures
    )
    assert loss.excess(1e9, None) is not None
