"""Which number of a prefix is the layer, and which block is meant."""

from pathlib import Path

import pytest

from diffdeploy.checkpoints.places import choose_block, layer_numbers
from diffdeploy.errors import InputError

PATH = Path("checkpoint")


@pytest.mark.parametrize(
    ("prefixes", "others", "layers"),
    [
        (["layers.5.0."], ["layers.4.0.mlp.weight", "layers.5.0.norm.weight"], [5]),
        (["layers.5.0."], ["layers.5.1.mlp.weight"], [0]),
        (["layers.5.0."], [], [None]),
        (["stages.0.blocks.0.", "stages.0.blocks.1.", "stages.1.blocks.0."], [], [None, None, None]),
        (["layers.10.attn.", "layers.9.attn."], [], [9, 10]),
        (["encoder.layers.0.attn.", "decoder.layers.0.attn."], [], [0, 0]),
        ([""], [], [None]),
        (["norm2."], [], [None]),
        (["blocks.3.attn2.inner.0."], ["blocks.2.attn2.inner.0.w"], [3]),
    ],
    ids=lambda value: "+".join(map(str, value)) or "none",
)
def test_the_layer_is_the_number_that_varies(prefixes: list[str], others: list[str], layers: list[int | None]) -> None:
    keys = [*(f"{prefix}q_proj.weight" for prefix in prefixes), *others]
    assert list(layer_numbers(prefixes, keys).values()) == layers


BLOCKS = {
    "encoder.layers.0.attn.": 0,
    "encoder.layers.1.attn.": 1,
    "decoder.layers.0.attn.": 0,
    "decoder.layers.1.attn.": 1,
}


def test_a_prefix_and_a_layer_choose_together() -> None:
    assert choose_block(BLOCKS, PATH, prefix="decoder.layers.1.attn") == "decoder.layers.1.attn."
    assert choose_block(BLOCKS, PATH, prefix="decoder.layers.1.attn.") == "decoder.layers.1.attn."
    assert choose_block(BLOCKS, PATH, prefix="decoder", layer=1) == "decoder.layers.1.attn."
    assert choose_block({"": None}, PATH) == ""
    assert choose_block({"a.1.": 1, "a.10.": 10}, PATH, prefix="a.1") == "a.1."


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "several such blocks; choose one with --prefix: encoder.layers.0.attn, encoder.layers.1.attn"),
        ({"layer": 1}, "choose one with --prefix: encoder.layers.1.attn, decoder.layers.1.attn"),
        ({"prefix": "decoder"}, "several layers; choose one with --layer: 0, 1"),
        ({"layer": 4}, "layer 4 is not in checkpoint; its layers are: 0, 1"),
        ({"prefix": "dec"}, "no block of checkpoint has the prefix dec; there are encoder.layers.0.attn, "),
        ({"prefix": "decoder", "layer": 7}, "layer 7 is not in checkpoint"),
    ],
    ids=str,
)
def test_what_is_there_is_said(asked: dict[str, int | str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        choose_block(BLOCKS, PATH, **asked)  # type: ignore[arg-type]  # options of both types by name
    assert message in str(refused.value)
