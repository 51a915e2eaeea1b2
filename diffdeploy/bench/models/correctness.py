"""Check, from the logits after the last token, that a candidate computes the model on the tokens used for timing.

The criterion is that of the verification. If the formula takes at most ``2e11`` multiplications, the exact result is
the formula in numpy fp64, and the yardstick is the eager model with the formula as the paper writes it. Above that,
both come from the eager model with ``impl="padded"``, in fp64 and in the dtype, as for blocks.

Shape suffixes: B batch, S tokens, V vocabulary.
"""

from math import prod
from typing import Any

import numpy as np

from diffdeploy.arrays import Array, to_array
from diffdeploy.bench.correctness import Verdict
from diffdeploy.bench.models.plan import ModelCandidate, ModelPlan, opened
from diffdeploy.bundle import Quantisation, frozen_module, read_tensors, read_weights
from diffdeploy.config import DecoderConfig
from diffdeploy.graphs import graph_spec
from diffdeploy.ops import Impl
from diffdeploy.verify.activations import quantised_inputs
from diffdeploy.verify.decoder import exact_ways, logits_of
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.values import prompt_inputs

__all__ = ["expected_logits", "judge_logits", "quantised_activations", "tokens_of"]

_MAX_PRODUCTS = 2e11


def tokens_of(plan: ModelPlan, batch_size: int, length: int) -> Array:
    """Tokens ``[B, S]`` for all candidates, with a fixed seed."""
    assert isinstance(plan.config, DecoderConfig)
    generator = np.random.default_rng([plan.seed, batch_size, length])
    return generator.integers(0, plan.config.vocab_size, (batch_size, length))


def quantised_activations(candidate: ModelCandidate) -> Quantisation | None:
    """Quantisation with which a candidate computes, if it includes activations: only that of a bundle does."""
    if candidate.kind != "bundle" or candidate.path is None:
        return None
    return opened(candidate.path).manifest.options.quantised_activations


def expected_logits(plan: ModelPlan, tokens_BS: Array, quantisation: Quantisation | None = None) -> Yardstick:
    """Exact logits after the last token, ``[B, V]``, with the allowed error of a correct candidate.

    Args:
        plan: what is measured.
        tokens_BS: tokens for all candidates.
        quantisation: see `quantised_activations`.
    """
    import torch

    config = plan.config
    assert isinstance(config, DecoderConfig)
    batch, length = tokens_BS.shape
    products = batch * length * sum(prod(shape) for shape in config.weight_shapes().values())
    dtype = getattr(torch, plan.dtype)
    if products > _MAX_PRODUCTS:
        yardstick = Yardstick(_eager(plan, tokens_BS, Impl.PADDED, torch.float64), plan.dtype)
        yardstick.add(_eager(plan, tokens_BS, Impl.PADDED, dtype))
        if quantisation is None:
            return yardstick
        quantised = _eager(plan, tokens_BS, Impl.PADDED, torch.float64, quantisation)
        return yardstick.with_quantised(quantised)
    spec = graph_spec(
        "model",
        config,
        dtype=plan.dtype,
        max_batch_size=max(2, batch),
        max_sequence_length=max(4, length),
        logits="last",
    )
    inputs = prompt_inputs(spec, tokens_BS)
    weights = read_weights(opened(plan.bundle))
    _, *logits = logits_of(exact_ways(config, weights, inputs, spec, plan.dtype, quantisation))
    exact, stored, *others = (each[:, -1] for each in logits if each is not None)
    yardstick = Yardstick(exact, plan.dtype)
    yardstick.add(_eager(plan, tokens_BS, Impl.NAIVE, dtype))
    yardstick.add_stored(stored)
    for quantised_BV in others:
        yardstick = yardstick.with_quantised(quantised_BV)
    return yardstick


def _eager(
    plan: ModelPlan, tokens_BS: Array, impl: Impl, dtype: Any, quantisation: Quantisation | None = None
) -> Array:
    import torch

    weights = read_tensors(opened(plan.bundle))
    model: Any = frozen_module(plan.config, weights, impl=impl, max_positions=plan.max_length, dtype=dtype)
    model.to(plan.device)
    with quantised_inputs(model, quantisation):
        return to_array(model(torch.from_numpy(tokens_BS).to(plan.device), last_only=True)[:, -1])


def judge_logits(logits_BV: Array, expected: Yardstick) -> Verdict:
    """Judge the logits of a candidate."""
    report = measure("logits", logits_BV, expected)
    return Verdict(report.passed, report.budget_used, report.reason)
