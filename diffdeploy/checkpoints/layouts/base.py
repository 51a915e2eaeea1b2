"""What a layout is: a table from canonical weights to the keys and rows of a code base, and a few facts beside it."""

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
    """Where a canonical weight stands.

    Attributes:
        key: behind the prefix of the block.
        parts: of a projection that packs several, whose rows stand one after the other in `order`; the first letter of
            each is the projection that it is a part of.
        order: of all parts in the tensor; empty where it is not packed.
        halves: its heads are those of stream 1 first, then those of stream 2; canonical are pairs.
        scalar: a number that stands for the inner product of two vectors.
    """

    key: str
    parts: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    halves: bool = False
    scalar: bool = False


def packed(key: str, kind: str, *order: str) -> dict[str, Source]:
    """Sources of the projections that one tensor packs.

    Args:
        key: behind the prefix.
        kind: ``weight`` or ``bias``.
        order: of its parts.
    """
    sources = {}
    for letter in dict.fromkeys(part[0] for part in order):
        parts = tuple(part for part in order if part[0] == letter)
        sources[f"{letter}_proj.{kind}"] = Source(key, parts=parts, order=order, halves=len(parts) > 1)
    return sources


def lambda_sources(prefix: str = "") -> dict[str, Source]:
    """The four lambda vectors under their usual names."""
    return {name: Source(prefix + name) for name in LAMBDA_VECTORS}


# Compared by identity, so that a layout is a key of dictionaries although it holds mappings.
@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A code base whose checkpoints can be read and written.

    Attributes:
        name: for ``--layout``.
        what: the code base, for people.
        sources: canonical weights that every block has.
        optional: canonical weights that a block may have.
        absent: keys which no block of this layout has.
        irrelevant: keys that a block may have and nobody needs, with the reason.
        model_types: ``model_type`` in config.json begins with one of these; empty where it says nothing.
        version: of differential attention.
        depth_offset: added to the layer index to give the depth of ``lambda_init``.
        gqa_layout: key map; ``None`` where the same keys are used for both.
        causal: whether the block is; ``None`` where the same keys are used for both.
        causal_by_prefix: whether blocks whose prefix begins with a name are, before `causal`.
        lambda_init: of every layer, where it does not follow from the depth.
        lambda_kind: how lambda is made, see `DiffAttentionConfig`; ``token`` in the second version.
        numbers: facts that a block stores as a tensor of one number, ``lambda_init`` or ``softmax_scale``, with its key
            behind the prefix.
        values: width of the values: ``pair`` for ``2d``, ``stream`` for ``d``, ``rows`` where their rows say it.
        norm: of the heads: ``rms``, ``none``, or ``weighted`` for one where its weight is there.
        output_scale: factor behind the norm of the heads; ``None`` for ``1 - lambda_init``.
        noise_repeat: heads that share one noise query, by the fields; their query rows are ``[groups, repeat + 1, d]``,
            the noise last. ``None`` where each head has its own.
        rope: rotary embedding by the fields of config.json and the base that the user gave; ``None`` where the fields
            do not say.
        turns_back: whether the rotary embedding turns by minus the angle.
        of_others: fields of config.json that are named like a fact about attention and mean another part of the model.
        reads_window: whether `sliding_window` reads the fields of that name.
        class_defaults: fields whose absence means the default of the source's own config class.
        config_class: that class, for the record of where a value came from.
        eos_token_id: the token that ends texts by default of that class; ``None`` where it has none.
        norm_eps_field: field with the norm's epsilon, 1e-5 where there is none.
        qk_norm_eps: epsilon of the optional norms of queries and keys.
        head_fields: fields that must agree with the shapes, with the multiple of ``num_heads`` or ``num_kv_heads``;
            ``None`` for as many as the values of a head are wide, in streams.
        sliding_window: by the fields and the layer; raises `UnknownWindowError` where the fields do not say.
        refuse: why a block cannot be deployed, by its keys, the fields and the layer.
        why_no_model: why blocks of this layout make no whole decoder; ``None`` where they do.
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
        """Whether both streams of a head read the same keys, and values of the same width."""
        return self.version != 1

    @property
    def anchor(self) -> str:
        """The key that tells where blocks are."""
        # Every block has queries, packed or not, and cross-attention layers that are to be refused have nothing else.
        return self.sources["q_proj.weight"].key

    @property
    def norm_weight(self) -> Source:
        """Where the weight of the heads' norm stands."""
        return self.sources.get("subln.weight") or self.optional["subln.weight"]

    def required_keys(self) -> list[str]:
        """Keys that every block has."""
        return list(dict.fromkeys([*(source.key for source in self.sources.values()), *self.numbers.values()]))


# Older transformers stored what follows from the config.
ROTARY_BUFFERS = {"rotary_emb.inv_freq": "the frequencies follow from config.json, and are computed in fp64 here"}


class UnknownThetaError(InputError):
    """Nothing says the base of the rotary frequencies."""


class UnknownWindowError(InputError):
    """Nothing says how many keys a position sees."""


def no_rope(fields: Fields, theta: float | None) -> RopeConfig | None:
    """For a code base whose blocks have no rotary embedding, whatever its config says."""
    return None


def huggingface_rope(fields: Fields, theta: float | None, default_theta: float | None = None) -> RopeConfig:
    """Rotate-half embedding from the fields of a transformers config, of version 4 or 5.

    Args:
        fields: of config.json.
        theta: base that the user gave; it goes before the file's.
        default_theta: base of the config class, where the file does not have the field at all.

    Raises:
        UnknownThetaError: no base.
        InputError: a field of the wrong type, or a scaling that is not supported.
    """
    # `rope_parameters` since transformers 5, with theta in it; before that `rope_scaling`, with theta beside it.
    parameters = _object(fields, "rope_parameters") or _object(fields, "rope_scaling") or {}
    if theta is None:
        theta = typed_field(parameters, "rope_theta", float)
    if theta is None:
        # A field that is null is no field that is absent: somebody took the value away.
        theta = typed_field(fields, "rope_theta", float) if "rope_theta" in fields else default_theta
    if theta is None:
        raise UnknownThetaError("rope_theta is missing")
    # `type` is what older files call it.
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise InputError(f"partial_rotary_factor is {shortened(partial)}; accepted is 1: every channel is turned")
    if kind in (None, "default"):
        return RopeConfig(style="half", theta=float(theta))
    # The others change with the length at run time, which no table can say.
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"rope_type is {shortened(kind)}; accepted are default, linear, llama3 and yarn")
    if typed_field(parameters, "factor", float) is None:
        raise InputError(f"rope_type is {kind}, which needs a factor beside it in config.json")
    # transformers keeps fields of other kinds in the same object; the rest of the defaults are those of `RopeScaling`.
    known = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    numbers: dict[str, Any] = {
        name: value for name in known if (value := typed_field(parameters, name, float)) is not None
    }
    context = typed_field(parameters, "original_max_position_embeddings", int)
    numbers |= {} if context is None else {"original_max_position_embeddings": context}
    if kind == "yarn":
        if context is None:
            raise InputError("rope_type is yarn, which needs original_max_position_embeddings beside it in config.json")
        numbers |= _yarn_attention_factor(parameters, numbers)
        numbers["truncate"] = _truncates(parameters)
    scaling = RopeScaling(kind=kind, **numbers)
    return RopeConfig(style="half", theta=float(theta), scaling=scaling)


def _yarn_attention_factor(parameters: Fields, numbers: Mapping[str, float]) -> dict[str, float]:
    """What a file says by ``mscale`` and ``mscale_all_dim``; both or none count, as in transformers."""
    parts = [typed_field(parameters, name, float) for name in ("mscale", "mscale_all_dim")]
    if "attention_factor" in numbers or not all(parts):
        return {}
    above, below = (0.1 * part * math.log(max(numbers["factor"], 1.0)) + 1.0 for part in parts if part is not None)
    return {"attention_factor": above / below}


def _truncates(parameters: Fields) -> bool:
    value = parameters.get("truncate")
    if value is not None and not isinstance(value, bool):
        raise InputError(f"truncate in config.json is {shortened(value)}; accepted is true or false")
    return value is not False


def _object(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name} in config.json is {shortened(value)}; accepted is a JSON object")
    return value or {}
