"""The parts of a whole model around its blocks, with one table of names for each family of code bases."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from diffdeploy.errors import InputError

__all__ = ["LLAMA", "SKELETONS", "Skeleton", "find_skeleton", "skeleton_of"]

# Older files contain values that follow from the config.
_TABLES = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """Names of a model's tensors outside the blocks, without the prefix that all keys share.

    Attributes:
        name: name of the family.
        embedding: key of the token embedding.
        layer: prefix of the keys of a layer, in which ``{}`` stands for its number.
        block: prefix of the keys of its attention, after ``layer``.
        parts: keys of the other tensors of a layer, which follow ``layer``, by canonical name.
        norm: key of the final norm.
        head: key of the output head.
    """

    name: str
    embedding: str
    layer: str
    block: str
    parts: dict[str, str]
    norm: str
    head: str

    def layers(self, keys: Collection[str]) -> Iterator[int]:
        """Numbers of layers with at least one tensor, ascending."""
        before, after = self.layer.split("{}")
        found = {key.removeprefix(before).partition(after)[0] for key in keys if key.startswith(before)}
        yield from sorted(int(number) for number in found if number.isdecimal())

    def is_irrelevant(self, key: str) -> bool:
        """True if a key is known and can be ignored."""
        return key.endswith(_TABLES)


def _mlp(prefix: str, act: str) -> dict[str, str]:
    linear = {
        f"ffn.{name}_proj.{kind}": f"{prefix}{name}_proj.{kind}"
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }
    return {**linear, **{f"ffn.act.{kind}": f"{prefix}{act}.{kind}" for kind in ("weight", "bias")}}


LLAMA = Skeleton(
    name="Llama's names, as in transformers",
    embedding="model.embed_tokens.weight",
    layer="model.layers.{}.",
    block="self_attn.",
    parts={
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        **_mlp("mlp.", "act_fn"),
    },
    norm="model.norm.weight",
    head="lm_head.weight",
)

SKELETONS = (
    LLAMA,
    Skeleton(
        name="diffdeploy's names",
        embedding="embedding.weight",
        layer="layers.{}.",
        block="self_attn.",
        parts={
            "attention_norm.weight": "attention_norm.weight",
            "ffn_norm.weight": "ffn_norm.weight",
            **_mlp("ffn.", "act"),
        },
        norm="norm.weight",
        head="lm_head.weight",
    ),
)


# Names in a user's table, which must contain every part of a layer except biases and PolyNorm's weights.
_PLACES = ("embedding", "layer", "attention", "norm", "head")
_REQUIRED_PARTS = [name for name in LLAMA.parts if not name.endswith(".bias") and ".act." not in name]


def find_skeleton(keys: Collection[str], names: str | None = None) -> Skeleton | None:
    """Family whose embedding is among the keys; ``None`` for a checkpoint of blocks.

    Args:
        keys: keys of the checkpoint.
        names: a user's table of names, see `skeleton_of`, which replaces the families.

    Raises:
        InputError: ``names`` is not such a table, or its embedding is not among the keys.
    """
    if names is None:
        return next((each for each in SKELETONS if each.embedding in keys), None)
    skeleton = skeleton_of(names)
    if skeleton.embedding not in keys:
        raise InputError(f"the embedding is {skeleton.embedding} in the table of names, but the checkpoint lacks it")
    return skeleton


def skeleton_of(names: str) -> Skeleton:
    """Read a table of names that the user wrote.

    Args:
        names: JSON object with ``embedding``, ``norm`` and ``head``, which are keys; ``layer``, the prefix of a layer
            with ``{}`` for its number; ``attention``, the prefix of the block, which follows the layer's; and the keys
            of the layer's other tensors, without the layer's prefix, by their canonical names, such as
            ``ffn.gate_proj.weight``.

    Raises:
        InputError: it is not such an object.
    """
    try:
        table = json.loads(names)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the table of names is not JSON: {error}") from error
    known = (*_PLACES, *LLAMA.parts)
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise InputError(f"the table of names is not an object of strings; accepted names: {', '.join(known)}")
    if unknown := [name for name in table if name not in known]:
        raise InputError(f"the table of names has {', '.join(unknown)}; accepted: {', '.join(known)}")
    if absent := [name for name in (*_PLACES, *_REQUIRED_PARTS) if name not in table]:
        raise InputError(f"the table of names lacks {', '.join(absent)}")
    if table["layer"].count("{}") != 1:
        raise InputError(f"layer is {table['layer']!r} in the table of names; accepted: a prefix with one {{}} in it")
    return Skeleton(
        name="the names given",
        embedding=table["embedding"],
        layer=table["layer"],
        block=table["attention"],
        parts={name: key for name, key in table.items() if name not in _PLACES},
        norm=table["norm"],
        head=table["head"],
    )
