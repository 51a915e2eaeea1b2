"""Every size and flag of one differential-attention block, validated once; properties say what kind of block it is."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from diffdeploy.config.requirement import require
from diffdeploy.config.rope import RopeConfig

if TYPE_CHECKING:
    from diffdeploy.config.block_v2 import AnyConfig

__all__ = [
    "LAMBDA_VECTORS",
    "DiffAttentionConfig",
    "GqaLayout",
    "LambdaKind",
    "check_sizes",
    "is_lambda_vector",
    "lambda_init_at",
]

# Vectors of the paper's lambda. They stay in fp32 whatever the dtype of the block, since rounding them to bfloat16
# costs more accuracy than all other roundings on the way to lambda.
LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")

GqaLayout = Literal["canonical", "legacy"]
LambdaKind = Literal["layer", "head", "token", "fixed"]


def is_lambda_vector(name: str) -> bool:
    """True if the weight of a block or a model with this canonical name is one of the vectors of lambda."""
    return name.rpartition(".")[2] in LAMBDA_VECTORS


def lambda_init_at(depth: int) -> float:
    """``lambda_init = 0.8 - 0.6 exp(-0.3 depth)`` for the 0-based layer index ``depth``.

    Source: arXiv 2410.05258, section 2.1 (where layers are counted from 1).
    """
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def check_sizes(config: "AnyConfig") -> None:
    """Check the fields that both versions of the block share, and that they fit together.

    Raises:
        InputError: a field is invalid; the message names it, the given value and the accepted values.
    """
    for field in ("embed_dim", "num_heads", "num_kv_heads", "head_dim"):
        require(getattr(config, field) >= 1, field, getattr(config, field), "a positive integer")
    require(
        config.num_heads % config.num_kv_heads == 0,
        "num_kv_heads",
        config.num_kv_heads,
        f"a divisor of num_heads ({config.num_heads})",
    )
    rope = config.rope
    require(
        rope is None or rope.rotary_dim is not None or config.head_dim % 2 == 0,
        "head_dim",
        config.head_dim,
        "even when rotary embedding is used, since it rotates pairs of channels",
    )
    require(
        rope is None or rope.width(config.head_dim) <= config.head_dim,
        "rope.rotary_dim",
        rope and rope.rotary_dim,
        f"at most head_dim ({config.head_dim})",
    )
    eps = config.qk_norm_eps
    require(eps is None or (math.isfinite(eps) and eps > 0), "qk_norm_eps", eps, "None or a positive number")
    require(
        # A window limits only how old a key may be; without causality, all later keys would remain visible.
        config.sliding_window is None or (config.sliding_window >= 1 and config.causal),
        "sliding_window",
        config.sliding_window,
        "None, or a positive number of keys in a causal block",
    )


@dataclass(frozen=True, kw_only=True)
class DiffAttentionConfig:
    """Sizes and flags of one block in canonical form.

    Attributes:
        embed_dim: model width ``D``.
        num_heads: number of differential heads ``h``; the softmax model of equal size has ``2h``.
        num_kv_heads: number of differential key/value heads ``h_kv``; divides ``h``.
        head_dim: width ``d`` of a stream.
        value_head_dim: width ``e`` of a head's value and output; ``None`` for ``2d``, as in the paper.
        lambda_init: constant part of lambda; see `lambda_init_at`.
        lambda_kind: ``layer`` for one number, from vectors ``[d]``; ``head`` for one number per head, from vectors
            ``[h, d]``; ``fixed`` for ``lambda_init`` itself, without vectors.
        softmax_scale: factor of the scores; ``None`` for ``d ** -0.5``.
        causal: true if position ``i`` attends only to keys up to ``i`` (aligned bottom-right).
        rope: rotary embedding of queries and keys; ``None`` for none.
        norm_eps: epsilon of the RMS norm over each head's ``e`` outputs; ``None`` for no such norm.
        norm_affine: true if that norm has a weight (gamma, ``[e]``).
        output_scale: factor that follows the norm; ``1 - lambda_init`` in the paper.
        qk_norm_eps: epsilon of an RMS norm with a weight over each query and key stream (``d``), before the rotary
            embedding; ``None`` for no such norm.
        qkv_bias: true if the q, k and v projections have biases.
        out_bias: true if the output projection has a bias.
        gqa_layout: map from streams of queries to the ``2 h_kv`` streams of keys. With ``g = h / h_kv``, stream ``s``
            of query head ``i`` reads key stream ``2 (i // g) + s`` if it is ``canonical`` (Microsoft's flash modules),
            and ``(2i + s) // g`` if it is ``legacy`` (Microsoft's naive module and multihead-sdpadiff). The two agree
            when ``g`` is 1.
        sliding_window: number of keys that a position attends to, including its own; ``None`` for all. Requires
            ``causal``.
        version: 1, the block of the paper.

    Raises:
        InputError: a field is out of range; the message names it, the given value and the accepted values.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    # A number rather than a depth: sources count layers from -1, 0 or 1, and some store the number.
    lambda_init: float
    # Not derived from lambda_init, since some sources lack the factor.
    output_scale: float
    causal: bool = True
    rope: RopeConfig | None = None
    value_head_dim: int | None = None
    lambda_kind: LambdaKind = "layer"
    # One source stores it as a rounded number, which recomputing would not reproduce.
    softmax_scale: float | None = None
    # The originals' value, which their state dicts do not contain.
    norm_eps: float | None = 1e-5
    norm_affine: bool = True
    qk_norm_eps: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    # Names and shapes of weights are the same in both layouts, so a checkpoint cannot show which one it has.
    gqa_layout: GqaLayout = "canonical"
    sliding_window: int | None = None
    # Distinguishes the two configs when they are read from JSON.
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        check_sizes(self)
        require(math.isfinite(self.lambda_init), "lambda_init", self.lambda_init, "a finite number")
        require(math.isfinite(self.output_scale), "output_scale", self.output_scale, "a finite number")
        eps, width, scale = self.norm_eps, self.value_head_dim, self.softmax_scale
        require(eps is None or (math.isfinite(eps) and eps > 0), "norm_eps", eps, "None or a positive number")
        require(eps is not None or not self.norm_affine, "norm_affine", self.norm_affine, "False without a norm")
        require(width is None or width >= 1, "value_head_dim", width, "None or a positive integer")
        require(
            scale is None or (math.isfinite(scale) and scale > 0), "softmax_scale", scale, "None or a positive number"
        )
        require(self.lambda_kind in ("layer", "head", "fixed"), "lambda_kind", self.lambda_kind, "layer, head or fixed")
        require(self.gqa_layout in get_args(GqaLayout), "gqa_layout", self.gqa_layout, "canonical or legacy")

    @property
    def attention(self) -> "DiffAttentionConfig":
        """This config; for a decoder, the same property returns the block that represents all layers."""
        return self

    @property
    def blocks(self) -> dict[str, "DiffAttentionConfig"]:
        """Block configs by the prefix of their weight names: only this one, with an empty prefix."""
        return {"": self}

    @property
    def value_dim(self) -> int:
        """Width ``e`` of one head's value and output."""
        return 2 * self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5) if self.softmax_scale is None else self.softmax_scale

    @property
    def lambda_shape(self) -> tuple[int, ...]:
        """Shape of each lambda vector."""
        return (self.num_heads, self.head_dim) if self.lambda_kind == "head" else (self.head_dim,)

    @property
    def num_key_streams(self) -> int:
        """Number of key heads of width ``d``: two per key/value head."""
        return 2 * self.num_kv_heads

    @property
    def key_cache_dim(self) -> int:
        """Width ``2d`` of one head in the key cache, which holds both streams side by side."""
        return 2 * self.head_dim

    @property
    def group_size(self) -> int:
        """Number of query heads per key/value head, ``g = h / h_kv``."""
        return self.num_heads // self.num_kv_heads

    @property
    def has_norm(self) -> bool:
        """True if each head's output is normalised."""
        return self.norm_eps is not None

    @property
    def has_head_step(self) -> bool:
        """True if a head is changed before the output projection, by a norm or by a factor alone."""
        return self.has_norm or self.output_scale != 1

    @property
    def constant_lambda(self) -> bool:
        """True if lambda is one number that depends neither on the head nor on the input."""
        return self.lambda_kind in ("layer", "fixed")

    @property
    def streams_share_keys(self) -> bool:
        """True if both streams of a head read the same keys."""
        return False

    @property
    def permutes_key_streams(self) -> bool:
        """True if the key map differs from the canonical one."""
        return self.gqa_layout == "legacy" and self.group_size > 1

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of this block's canonical weights, as in `DiffAttention.state_dict`."""
        q_rows, k_rows = 2 * self.num_heads * self.head_dim, self.num_key_streams * self.head_dim
        v_rows, out_columns = self.num_kv_heads * self.value_dim, self.num_heads * self.value_dim
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (q_rows, self.embed_dim),
            "k_proj.weight": (k_rows, self.embed_dim),
            "v_proj.weight": (v_rows, self.embed_dim),
            "out_proj.weight": (self.embed_dim, out_columns),
        }
        if self.qkv_bias:
            shapes |= {"q_proj.bias": (q_rows,), "k_proj.bias": (k_rows,), "v_proj.bias": (v_rows,)}
        if self.out_bias:
            shapes["out_proj.bias"] = (self.embed_dim,)
        if self.lambda_kind != "fixed":
            shapes |= dict.fromkeys(LAMBDA_VECTORS, self.lambda_shape)
        if self.qk_norm_eps is not None:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        if self.norm_affine:
            shapes["subln.weight"] = (self.value_dim,)
        return shapes
