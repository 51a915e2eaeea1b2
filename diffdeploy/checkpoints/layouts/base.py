"""Definition of a layout: where a code base stores each canonical weight, and what its blocks have in common."""

import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

from diffdeploy.checkpoints.fields import Fields, shortened, typed_field
from diffdeploy.config import LAMBDA_VECTORS, GqaLayout, LambdaKind, RopeConfig, RopeScaling
from diffdeploy.errors import InputError

__all__ = [
    "ROTARY_BUFFERS",
    "Layout",
    "Source",
    "UnknownThetaError",
    "UnknownWindowError",
    "huggingface_rope",
    "lambda_sources",
    "no_rope",
    "packed",
]


@dataclass(frozen=True)
class Source:
    """Location of a canonical weight in a checkpoint.

    Attributes:
        key: key without the prefix of the block.
        parts: parts of the tensor that belong to this weight, if the tensor packs several projections; the first letter
            of each part names its projection.
        order: order in which the rows of all parts follow each other in the tensor; empty if it is not packed.
        halves: true if the heads of stream 1 precede those of stream 2; in the canonical order they form pairs.
        scalar: true if the tensor is a number that replaces the inner product of two vectors.
    """

    key: str
    parts: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    halves: bool = False
    scalar: bool = False


def packed(key: str, kind: str, *order: str) -> dict[str, Source]:
    """Sources of the projections that one tensor packs.

    Args:
        key: key without the prefix.
        kind: ``weight`` or ``bias``.
        order: order of the parts.
    """
    sources = {}
    for letter in dict.fromkeys(part[0] for part in order):
        parts = tuple(part for part in order if part[0] == letter)
        sources[f"{letter}_proj.{kind}"] = Source(key, parts=parts, order=order, halves=len(parts) > 1)
    return sources


def lambda_sources(prefix: str = "") -> dict[str, Source]:
    """Sources of the four lambda vectors under their usual names."""
    return {name: Source(prefix + name) for name in LAMBDA_VECTORS}


# Layouts are compared by identity, so that they can be dictionary keys although they contain mappings.
@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A code base whose checkpoints can be read and written.

    Attributes:
        name: name of the layout, for ``--layout``.
        what: human-readable description of the code base.
        sources: canonical weights that every block has.
        optional: canonical weights that a block may have.
        absent: keys that no block of this layout has.
        irrelevant: keys that a block may have and that can be ignored, with the reason.
        model_types: prefixes of ``model_type`` in config.json; empty if the field is not decisive.
        version: version of differential attention.
        depth_offset: difference between the depth in ``lambda_init`` and the layer index.
        gqa_layout: key map; ``None`` if both maps occur with the same keys.
        causal: true for causal blocks; ``None`` if both kinds occur with the same keys.
        causal_by_prefix: value that overrides `causal` for blocks whose prefix begins with the given text.
        lambda_init: constant of every layer, if it does not follow from the depth.
        lambda_kind: form of lambda, see `DiffAttentionConfig`; ``token`` in the second version.
        numbers: facts that a block stores as a tensor of one number, ``lambda_init`` or ``softmax_scale``, with the key
            without the prefix.
        values: width of the values: ``pair`` for ``2d``, ``stream`` for ``d``, ``rows`` if their rows determine it.
        norm: norm of the heads: ``rms``, ``none``, or ``weighted`` if a norm exists only with its weight.
        output_scale: factor after the norm of the heads; ``None`` for ``1 - lambda_init``.
        noise_repeat: function from the fields to the number of heads that share one noise query; the query rows are
            then ``[groups, repeat + 1, d]``, with the noise last. ``None`` if each head has its own noise query.
        rope: function from the fields of config.json and the user's base to the rotary embedding; ``None`` if the
            fields do not determine it.
        turns_back: true if the rotary embedding rotates by the negative angle.
        of_others: fields of config.json that describe another part of the model, despite their names.
        reads_window: true if `sliding_window` reads the fields of that name.
        class_defaults: fields whose absence means the default of the source's own config class.
        config_class: name of that class, for the record of where a value came from.
        eos_token_id: token that ends texts by default in that class; ``None`` if there is none.
        norm_eps_field: field with the norm's epsilon, which is 1e-5 if the field is absent.
        qk_norm_eps: epsilon of the optional norms of queries and keys.
        head_fields: fields that must agree with the shapes, each with ``num_heads`` or ``num_kv_heads`` and the factor
            by which that number is multiplied; ``None`` stands for the value width divided by the stream width.
        sliding_window: function from the fields and the layer to the window; raises `UnknownWindowError` if the fields
            do not determine it.
        refuse: function from the keys, the fields and the layer to the reason why a block cannot be deployed.
        why_no_model: reason why blocks of this layout do not form a whole decoder; ``None`` if they do.
    """

    name: str
    what: str
    sources: Mapping[str, Source]
    optional: Mapping[str, Source] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    irrelevant: Mapping[str, str] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    version: Literal[1, 2] = 1
    depth_offset: int = 0
    gqa_layout: GqaLayout | None = "canonical"
    causal: bool | None = True
    causal_by_prefix: Mapping[str, bool] = field(default_factory=dict)
    lambda_init: float | None = None
    lambda_kind: LambdaKind = "layer"
    numbers: Mapping[str, str] = field(default_factory=dict)
    values: Literal["pair", "stream", "rows"] = "pair"
    norm: Literal["rms", "weighted", "none"] = "rms"
    output_scale: float | None = None
    noise_repeat: Callable[[Fields], int] | None = None
    rope: Callable[[Fields, float | None], RopeConfig | None] | None = None
    turns_back: bool = False
    of_others: tuple[str, ...] = ()
    reads_window: bool = False
    class_defaults: Mapping[str, float] = field(default_factory=dict)
    config_class: str = ""
    eos_token_id: int | None = None
    norm_eps_field: str = "norm_eps"
    qk_norm_eps: float | None = None
    head_fields: Mapping[str, tuple[Literal["num_heads", "num_kv_heads"], int | None]] = field(default_factory=dict)
    sliding_window: Callable[[Fields, int | None], int | None] = lambda fields, layer: None
    refuse: Callable[[AbstractSet[str], Fields, int | None], str | None] = lambda keys, fields, layer: None
    why_no_model: str | None = None

    @property
    def streams_share_keys(self) -> bool:
        """True if both streams of a head read the same keys, which are as wide as the values."""
        return self.version != 1

    @property
    def anchor(self) -> str:
        """The key that shows where blocks are."""
        # Every block has queries, packed or not; cross-attention layers, which must be rejected, have nothing else.
        return self.sources["q_proj.weight"].key

    @property
    def norm_weight(self) -> Source:
        """Source of the weight of the heads' norm."""
        return self.sources.get("subln.weight") or self.optional["subln.weight"]

    def required_keys(self) -> list[str]:
        """List of the keys that every block has."""
        return list(dict.fromkeys([*(source.key for source in self.sources.values()), *self.numbers.values()]))


# Older versions of transformers stored values that follow from the config.
ROTARY_BUFFERS = {"rotary_emb.inv_freq": "the frequencies follow from config.json, and are computed in fp64 here"}


class UnknownThetaError(InputError):
    """The base of the rotary frequencies is unknown."""


class UnknownWindowError(InputError):
    """The number of keys that a position attends to is unknown."""


def no_rope(fields: Fields, theta: float | None) -> RopeConfig | None:
    """Rule of code bases whose blocks have no rotary embedding, whatever the config says."""
    return None


def huggingface_rope(fields: Fields, theta: float | None, default_theta: float | None = None) -> RopeConfig:
    """Rotate-half embedding from the fields of a transformers config, version 4 or 5.

    Args:
        fields: fields of config.json.
        theta: the user's base, which overrides the file's.
        default_theta: base of the config class, used if the field is absent from the file.

    Raises:
        UnknownThetaError: there is no base.
        InputError: a field has the wrong type, or the scaling is not supported.
    """
    # transformers 5 has `rope_parameters`, with theta inside; earlier versions have `rope_scaling`, with theta outside.
    parameters = _object(fields, "rope_parameters") or _object(fields, "rope_scaling") or {}
    if theta is None:
        theta = typed_field(parameters, "rope_theta", float)
    if theta is None:
        # A field that is null differs from an absent field: somebody removed the value.
        theta = typed_field(fields, "rope_theta", float) if "rope_theta" in fields else default_theta
    if theta is None:
        raise UnknownThetaError("rope_theta is missing")
    # `type` is the name in older files.
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise InputError(f"partial_rotary_factor is {shortened(partial)}; accepted: 1, which rotates every channel")
    if kind in (None, "default"):
        return RopeConfig(style="half", theta=float(theta))
    # The other kinds depend on the length at run time, which a table cannot represent.
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"rope_type is {shortened(kind)}; accepted: default, linear, llama3 and yarn")
    if typed_field(parameters, "factor", float) is None:
        raise InputError(f"rope_type is {kind}, which needs a factor in config.json")
    # transformers keeps fields of other kinds in the same object; absent fields get the defaults of `RopeScaling`.
    known = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    numbers: dict[str, Any] = {
        name: value for name in known if (value := typed_field(parameters, name, float)) is not None
    }
    context = typed_field(parameters, "original_max_position_embeddings", int)
    numbers |= {} if context is None else {"original_max_position_embeddings": context}
    if kind == "yarn":
        if context is None:
            raise InputError("rope_type is yarn, which needs original_max_position_embeddings in config.json")
        numbers |= _yarn_attention_factor(parameters, numbers)
        numbers["truncate"] = _truncates(parameters)
    scaling = RopeScaling(kind=kind, **numbers)
    return RopeConfig(style="half", theta=float(theta), scaling=scaling)


def _yarn_attention_factor(parameters: Fields, numbers: Mapping[str, float]) -> dict[str, float]:
    """Attention factor from ``mscale`` and ``mscale_all_dim``; as in transformers, one without the other is ignored."""
    parts = [typed_field(parameters, name, float) for name in ("mscale", "mscale_all_dim")]
    if "attention_factor" in numbers or not all(parts):
        return {}
    above, below = (0.1 * part * math.log(max(numbers["factor"], 1.0)) + 1.0 for part in parts if part is not None)
    return {"attention_factor": above / below}


def _truncates(parameters: Fields) -> bool:
    value = parameters.get("truncate")
    if value is not None and not isinstance(value, bool):
        raise InputError(f"truncate in config.json is {shortened(value)}; accepted: true or false")
    return value is not False


def _object(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name} in config.json is {shortened(value)}; accepted: a JSON object")
    return value or {}
