"""Faults in the computation of a model: one wrong number, module or step, exported with the bundle's options."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffdeploy.bundle import Bundle, eager_module
from diffdeploy.config import DecoderConfig
from diffdeploy.exporters import lower_block
from diffdeploy.modules import DiffTransformer, block_class
from diffdeploy.selftest.blocks.cache import CachedBeforeRope, CachedStreamsExchanged
from diffdeploy.selftest.blocks.entry import is_traced, options_of
from diffdeploy.selftest.blocks.positions import CausalTopLeft, KeysNotTurned
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.conditions import causal_without_window, has_rope, version_1
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of
from diffdeploy.selftest.models.layers import HEAD

__all__ = ["computation_faults"]

Edit = Callable[[DiffTransformer], None]

# Shorter than most sequences of the sweep.
_WINDOW = 5


def _fault(name: str, breaks: str, where: str | None, edit: Edit, *conditions: When) -> Fault:
    def inject(target: FaultTarget) -> None:
        bundle = Bundle(target.path, target.manifest)
        model = eager_module(bundle, impl=target.manifest.options.attention_impl)
        assert isinstance(model, DiffTransformer)
        edit(model)
        lower_block(model, target.spec, target.path, options_of(target))

    return Fault(name=name, place="model", breaks=breaks, stage=where, inject=inject, applies=all_of(*conditions))


def _with_config(number: int, **changes: Any) -> Edit:
    """Replace the config of one layer's block."""

    def edit(model: DiffTransformer) -> None:
        block = model.layers[number].self_attn
        block.config = replace(block.config, **changes)

    return edit


def _with_step(number: int, step: type[Steps]) -> Edit:
    """Replace a step in one layer's block with a wrong one."""

    def edit(model: DiffTransformer) -> None:
        block = model.layers[number].self_attn
        block.__class__ = type(step.__name__, (step, block_class(block.config)), {})

    return edit


def _large_final_epsilon(model: DiffTransformer) -> None:
    assert model.norm.eps is not None
    model.norm.eps *= 100


def _norm_of(number: int, name: str) -> Edit:
    def edit(model: DiffTransformer) -> None:
        norm = getattr(model.layers[number], name)
        norm.eps *= 100

    return edit


def _another_head(model: DiffTransformer) -> None:
    """Replace the tied head of a model: each token gets the embedding of its neighbour."""
    other = model.embedding.weight.roll(1, dims=0).contiguous()
    model.lm_head.weight = nn.Parameter(other, requires_grad=False)


def _embedding_as_head(model: DiffTransformer) -> None:
    model.lm_head.weight = model.embedding.weight


def _scaled_mlp(number: int) -> Edit:
    """Make an MLP return 1 % too much."""

    def edit(model: DiffTransformer) -> None:
        ffn = model.layers[number].ffn

        class Scaled(type(ffn)):  # type: ignore[misc]  # the class of that module
            def forward(self, x: torch.Tensor) -> Any:
                return super().forward(x) * 1.01

        ffn.__class__ = Scaled

    return edit


class _CachesCrossed(DiffTransformer):
    """Model that returns the caches of the first and the last layer swapped."""

    def forward(self, *tensors: Any, **named: Any) -> Any:
        logits, caches = super().forward(*tensors, **named)
        caches[0], caches[-1] = caches[-1], caches[0]
        return logits, caches


def _crossed(model: DiffTransformer) -> None:
    model.__class__ = _CachesCrossed


def _is_tied(target: FaultTarget) -> bool:
    return target.decoder is not None and target.decoder.tied


def computation_faults(config: DecoderConfig) -> list[Fault]:
    """All faults in the computation, spread over the layers of a model."""
    last, middle = config.num_layers - 1, config.num_layers // 2
    traced = is_traced
    found = [
        _fault("final_norm_eps", "the epsilon of the final norm is 100 times too large", HEAD, _large_final_epsilon),
        _fault("head_of_another_embedding", "the tied head has the rows of neighbouring tokens", HEAD, _another_head,
               _is_tied),
        _fault("embedding_for_head", "the head is the embedding, though it has weights of its own", HEAD,
               _embedding_as_head, lambda target: not _is_tied(target)),
        _fault("norm_eps_of_one_layer", "the epsilon of one attention norm is 100 times too large", f"layer {middle}",
               _norm_of(middle, "attention_norm")),
        _fault("mlp_scaled", "one MLP returns 1 % too much", f"layer {last}", _scaled_mlp(last)),
        _fault("softmax_scale_of_one_layer", "one layer divides its scores by the square root of 2d", f"layer {middle}",
               _with_config(middle, softmax_scale=config.layers[middle].attention.scale * 2**-0.5), version_1),
        _fault("window_of_one_layer", "a sliding window in one layer", f"layer {last}",
               _with_config(last, sliding_window=_WINDOW), causal_without_window),
        _fault("keys_of_one_layer_not_turned", "no rotary embedding on the keys of one layer", f"layer {middle}",
               _with_step(middle, KeysNotTurned), traced, has_rope),
        _fault("one_layer_counts_from_its_start", "in one layer, new token i sees keys up to i, whatever the past",
               f"layer {last}", _with_step(last, CausalTopLeft), traced, causal_without_window),
        _fault("cache_of_one_layer_before_rope", "one layer caches keys that are not rotated yet", "layer 0",
               _with_step(0, CachedBeforeRope), traced, has_rope),
        _fault("cached_streams_of_one_layer_exchanged", "the key streams are swapped in the cache of one layer",
               f"layer {middle}", _with_step(middle, CachedStreamsExchanged), traced, version_1),
        _fault("caches_crossed", "the caches of the first and the last layer are returned swapped", "layer 0",
               _crossed, traced, lambda _: last > 0),
    ]  # fmt: skip
    return found
