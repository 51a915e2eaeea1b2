"""Sizes and flags of a block of the second version, with the same properties as a block of the first version."""

from dataclasses import dataclass
from typing import Literal

from diffdeploy.config.block import DiffAttentionConfig, GqaLayout, LambdaKind, check_sizes
from diffdeploy.config.rope import RopeConfig

__all__ = ["AnyConfig", "DiffAttentionV2Config"]


@dataclass(frozen=True, kw_only=True)
class DiffAttentionV2Config:
    """Sizes and flags of one block of the second version (Microsoft unilm, Diff-Transformer-V2).

    It has twice as many query heads as output heads, keys and values of width ``d`` shared by both streams, a sigmoid
    lambda per token and head, and no norm over the heads.

    Attributes:
        embed_dim: model width ``D``.
        num_heads: number of output heads ``h``; there are ``2h`` query heads.
        num_kv_heads: number of key/value heads ``h_kv``; divides ``h``, so that both streams of a head share one.
        head_dim: width ``d`` of queries, keys, values and outputs.
        causal: true if position ``i`` attends only to keys up to ``i`` (aligned bottom-right).
        rope: rotary embedding of queries and keys; ``None`` for none.
        qk_norm_eps: epsilon of an RMS norm with a weight over each query and key head (``d``), before the rotary
            embedding; ``None`` for no such norm, as in the original.
        sliding_window: number of keys that a position attends to, including its own; ``None`` for all. Requires
            ``causal``.
        version: 2.

    Raises:
        InputError: a field is out of range; the message names it, the given value and the accepted values.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    rope: RopeConfig | None = None
    qk_norm_eps: float | None = None
    sliding_window: int | None = None
    version: Literal[2] = 2

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def attention(self) -> "DiffAttentionV2Config":
        """This config; for a decoder, the same property returns the block that represents all layers."""
        return self

    @property
    def blocks(self) -> dict[str, "DiffAttentionV2Config"]:
        """Block configs by the prefix of their weight names: only this one, with an empty prefix."""
        return {"": self}

    @property
    def value_dim(self) -> int:
        """Width of one head's value and output, ``d``."""
        return self.head_dim

    @property
    def num_key_streams(self) -> int:
        """Number of key heads of width ``d``: one per key/value head."""
        return self.num_kv_heads

    @property
    def key_cache_dim(self) -> int:
        """Width of one head in the key cache, ``d``."""
        return self.head_dim

    @property
    def group_size(self) -> int:
        """Number of output heads per key/value head, ``g = h / h_kv``."""
        return self.num_heads // self.num_kv_heads

    # Properties that code reads from both kinds of block, and that are constant in this one.
    @property
    def gqa_layout(self) -> GqaLayout:
        """The canonical key map, the only one possible when both streams share one key head."""
        return "canonical"

    @property
    def scale(self) -> float:
        """Factor of the scores, ``d ** -0.5``."""
        return float(self.head_dim**-0.5)

    @property
    def lambda_kind(self) -> LambdaKind:
        """Always ``token``: lambda is a sigmoid per token and head."""
        return "token"

    @property
    def norm_eps(self) -> float | None:
        """Always ``None``, since heads are not normalised."""
        return None

    @property
    def norm_affine(self) -> bool:
        """Always false, since there is no norm that could have a weight."""
        return False

    @property
    def output_scale(self) -> float:
        """Always 1, since there is no factor."""
        return 1.0

    @property
    def lambda_init(self) -> float | None:
        """Always ``None``, since lambda has no constant part."""
        return None

    @property
    def has_norm(self) -> bool:
        """Always false, since the heads' outputs are not normalised."""
        return False

    @property
    def has_head_step(self) -> bool:
        """Always false, since heads are not changed before the output projection."""
        return False

    @property
    def constant_lambda(self) -> bool:
        """Always false, since lambda is computed per token and head."""
        return False

    @property
    def streams_share_keys(self) -> bool:
        """Always true, since both streams of a head read the same keys."""
        return True

    @property
    def permutes_key_streams(self) -> bool:
        """Always false, since the key map is canonical."""
        return False

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of this block's weights, as in `DiffAttentionV2.state_dict`."""
        kv_rows = self.num_kv_heads * self.head_dim
        norms = {} if self.qk_norm_eps is None else dict.fromkeys(("q_norm.weight", "k_norm.weight"), (self.head_dim,))
        return {
            # Each output head has two query streams, in neighbouring rows; both share one key and one value.
            "q_proj.weight": (2 * self.num_heads * self.head_dim, self.embed_dim),
            "k_proj.weight": (kv_rows, self.embed_dim),
            "v_proj.weight": (kv_rows, self.embed_dim),
            "out_proj.weight": (self.embed_dim, self.num_heads * self.head_dim),
            "lambda_proj.weight": (self.num_heads, self.embed_dim),
            **norms,
        }


AnyConfig = DiffAttentionConfig | DiffAttentionV2Config
