"""The parts of a whole model around its blocks, with one table of names for each family of code bases."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

__all__ = ["LLAMA", "SKELETONS", "Skeleton", "find_skeleton"]

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
        parts: names of the other tensors of a layer, after ``layer``, by their canonical names.
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


def find_skeleton(keys: Collection[str]) -> Skeleton | None:
    """Family whose embedding is among the keys; ``None`` for a checkpoint of blocks."""
    return next((each for each in SKELETONS if each.embedding in keys), None)
