"""Faults in the constants of a model: those of blocks, each in one layer, and those that need several layers.

A fault of a block is placed in the layer that its position in the table of faults determines, so that every layer gets
some faults. A constant that all layers share, such as a rotary table, is not a fault of one layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import AnyConfig, DecoderConfig
from diffdeploy.formats.expected import expected_constants
from diffdeploy.selftest.constant_fault import flipped, next_bit, times
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of
from diffdeploy.selftest.numbers import NUMBER_FAULTS
from diffdeploy.selftest.precision import PRECISION_FAULTS
from diffdeploy.selftest.weights import WEIGHT_FAULTS
from diffdeploy.verify.decoder import below

__all__ = ["layer_faults"]

# Function that returns the changed constants by their names in the model.
Change = Callable[[FaultTarget], Mapping[str, Array]]

HEAD = "head"


@dataclass(frozen=True)
class _LayerTarget(FaultTarget):
    """The block of one layer, as the target for faults of blocks."""

    number: int

    @property
    def config(self) -> AnyConfig:
        """Config of that block."""
        assert self.decoder is not None
        return self.decoder.layers[self.number].attention

    @classmethod
    def of(cls, target: FaultTarget, number: int) -> "_LayerTarget":
        """Create the target for the layer with that number."""
        prefix = _prefix(number)
        tables = {name: table for name, table in target.constants.items() if name.startswith("rope.")}
        constants = {**below(target.constants, prefix), **tables}
        return cls(target.path, target.manifest, constants, below(target.weights, prefix), number)


def _prefix(number: int) -> str:
    return f"layers.{number}.self_attn."


def _fault(name: str, breaks: str, where: str | None, change: Change, *conditions: When) -> Fault:
    """Create a fault of a model that consists of changed constants."""

    def is_held(target: FaultTarget) -> bool:
        changed = change(target)
        # If two layers are equal, confusing them has no effect.
        differs = any(not np.array_equal(array, target.constants.get(key, array)) for key, array in changed.items())
        return differs and changed.keys() <= target.constants.keys()

    def inject(target: FaultTarget) -> None:
        expected = expected_constants(target.manifest, target.weights)
        target.format.write_constants(target.path, expected, change(target))

    return Fault(
        name=name,
        place="constants",
        family="constants of models",
        breaks=breaks,
        stage=where,
        inject=inject,
        applies=all_of(*conditions, is_held),
    )


def _of_block(fault: Fault, number: int) -> Fault:
    """Create a fault in the constants of a block, in one layer."""
    in_block = fault.change
    assert in_block is not None

    def change(target: FaultTarget) -> Mapping[str, Array]:
        changed = in_block(_LayerTarget.of(target, number))
        return {name if name.startswith("rope.") else _prefix(number) + name: array for name, array in changed.items()}

    def applies(target: FaultTarget) -> bool:
        return fault.applies(_LayerTarget.of(target, number))

    # All layers share one pair of rotary tables.
    where = None if fault.stage == "rope" else f"layer {number}"
    return _fault(fault.name, f"{fault.breaks}, in one layer", where, change, applies)


def _of_layer(
    name: str, breaks: str, number: int, weight: str, edit: Callable[[Array], Array], *, after: int = 0
) -> Fault:
    """Create a fault that replaces a weight of a layer with ``edit`` of the same weight ``after`` layers later."""

    def change(target: FaultTarget) -> Mapping[str, Array]:
        assert target.decoder is not None
        source = (number + after) % target.decoder.num_layers
        return {f"layers.{number}.{weight}": edit(target.weights[f"layers.{source}.{weight}"])}

    return _fault(name, breaks, f"layer {number}", change)


def _lambda_of_another_layer(number: int, other: int) -> Fault:
    def change(target: FaultTarget) -> Mapping[str, Array]:
        name = "self_attn.lambda"
        return {f"layers.{number}.{name}": target.constants[f"layers.{other}.{name}"]}

    def is_held(target: FaultTarget) -> bool:
        return all(f"{_prefix(layer)}lambda" in target.constants for layer in (number, other))

    breaks = "the lambda of a neighbouring layer"
    return _fault("lambda_of_another_layer", breaks, f"layer {number}", change, is_held)


def _swapped(name: str, breaks: str, one: int, other: int, ending: str) -> Fault:
    """Create a fault that swaps, between two layers, the constants whose names end in ``ending``."""

    def change(target: FaultTarget) -> Mapping[str, Array]:
        held = target.constants
        changed: dict[str, Array] = {}
        for here, there in ((one, other), (other, one)):
            own = {key for key in held if key.startswith(f"layers.{here}.") and key.endswith(ending)}
            changed |= {key: held[key.replace(f"layers.{here}.", f"layers.{there}.", 1)] for key in own}
        return changed

    def is_held(target: FaultTarget) -> bool:
        names = [{key.removeprefix(f"layers.{n}.") for key in target.constants if key.startswith(f"layers.{n}.")}
                 for n in (one, other)]  # fmt: skip
        return names[0] == names[1]

    return _fault(name, breaks, f"layer {min(one, other)}", change, is_held)


def _around(name: str, breaks: str, where: str | None, weight: str, edit: Callable[[Array], Array]) -> Fault:
    """Create a fault that edits a weight outside the layers."""

    def change(target: FaultTarget) -> Mapping[str, Array]:
        return {weight: edit(target.weights[weight])}

    return _fault(name, breaks, where, change, lambda target: weight in target.weights)


def layer_faults(config: DecoderConfig) -> list[Fault]:
    """All faults in constants, spread over the layers of a model."""
    depth = config.num_layers
    of_blocks = [
        _of_block(fault, number % depth)
        for number, fault in enumerate((*WEIGHT_FAULTS, *PRECISION_FAULTS, *NUMBER_FAULTS))
        if fault.change is not None
    ]
    last, middle = depth - 1, depth // 2
    whole_row = flipped((config.vocab_size,), 0)
    found = [
        _of_layer("ffn_weight_scaled", "down_proj of one MLP is 1 % too large", last,
                  "ffn.down_proj.weight", times(1.01)),
        _of_layer("ffn_weight_off_by_one_bit", "one weight of gate_proj is changed to the next "
                  "representable number", middle,
                  "ffn.gate_proj.weight", next_bit),
        _of_layer("ffn_norm_missing", "the weight of the norm before an MLP is 1", 0, "ffn_norm.weight", np.ones_like),
        _around("final_norm_missing", "the weight of the final norm is 1", HEAD, "norm.weight", np.ones_like),
        _around("head_rows_reversed", "the rows of the head in reverse order", HEAD, "lm_head.weight", whole_row),
        _around("embedding_rows_reversed", "the rows of the embedding in reverse order", None, "embedding.weight",
                whole_row),
    ]  # fmt: skip
    if depth > 1:
        again = _same
        found += [
            _lambda_of_another_layer(last, last - 1),
            _of_layer("attention_norm_of_another_layer", "the norm before an attention is that of the next layer",
                      middle, "attention_norm.weight", again, after=1),
            _of_layer("ffn_norm_of_another_layer", "the norm before an MLP is that of the next layer", last,
                      "ffn_norm.weight", again, after=1),
            _of_layer("value_weight_of_another_layer", "v_proj is that of the next layer", 0, "self_attn.v_proj.weight",
                      again, after=1),
            _of_layer("ffn_weight_of_another_layer", "up_proj is that of the next layer", middle, "ffn.up_proj.weight",
                      again, after=1),
            _swapped("layers_swapped", "two layers are swapped", 0, last, ""),
            _swapped("attentions_swapped", "the attention weights of two layers are swapped", middle - 1,
                     middle, "_proj.weight"),
            _swapped("lambdas_swapped", "the lambdas of two layers are swapped", last - 1, last, ".lambda"),
        ]  # fmt: skip
    return [*of_blocks, *found]


def _same(array: Array) -> Array:
    return array
