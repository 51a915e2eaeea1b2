"""Sizes and flags of a block of the second version, with the same questions as one of the first."""

from dataclasses import dataclass
from typing import Literal

from diffdeploy.config.block import DiffAttentionConfig, GqaLayout, LambdaKind, check_sizes
from diffdeploy.config.rope import RopeConfig

__all__ = ["AnyConfig", "DiffAttentionV2Config"]


@dataclass(frozen=True, kw_only=True)
class DiffAttentionV2Config:
    """Sizes and flags of one block of the second version (Microsoft unilm, Diff-Transformer-V2).

    Twice as many query heads as output heads, keys and values of width ``d`` shared by both streams, a sigmoid lambda
    per token and head, and no norm of the heads.

    Attributes:
        embed_dim: model width ``D``.
        num_heads: output heads ``h``; there are ``2h`` query heads.
        num_kv_heads: key/value heads ``h_kv``; divides ``h``, so that the streams of a head share one.
        head_dim: width ``d`` of queries, keys, values and outputs.
        causal: position ``i`` sees keys up to ``i`` (aligned bottom-right).
        rope: rotary embedding of queries and keys, or ``None``.
        qk_norm_eps: epsilon of an RMS norm with a weight over each query and key head (``d``), before the rotary
            embedding; ``None`` for no such norm, as in the original.
        sliding_window: keys that a position sees, itself included; ``None`` for all. Needs ``causal``.
        version: 2.

    Raises:
        InputError: a field is out of range; the message names it, what was given and what is accepted.
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
        """The block itself, as that of a decoder stands for all of its layers."""
        return self

    @property
    def blocks(self) -> dict[str, "DiffAttentionV2Config"]:
        """Blocks by what the names of their weights begin with: this one, and nothing."""
        return {"": self}

    @property
    def value_dim(self) -> int:
        """Width of one head's value and output, ``d``."""
        return self.head_dim

    @property
    def num_key_streams(self) -> int:
        """Key heads of width ``d``: one per key/value head."""
        return self.num_kv_heads

    @property
    def key_cache_dim(self) -> int:
        """Width of one head in the key cache, ``d``."""
        return self.head_dim

    @property
    def group_size(self) -> int:
        """Output heads per key/value head, ``g = h / h_kv``."""
        return self.num_heads // self.num_kv_heads

    # From here on, what code asks of both kinds of block, and what has one answer in this one.
    @property
    def gqa_layout(self) -> GqaLayout:
        """The canonical key map: with one key head for both streams there is no other."""
        return "canonical"

    @property
    def scale(self) -> float:
        """Factor of the scores, ``d ** -0.5``."""
        return float(self.head_dim**-0.5)

    @property
    def lambda_kind(self) -> LambdaKind:
        """``token``: a sigmoid for each token and head."""
        return "token"

    @property
    def norm_eps(self) -> float | None:
        """``None``: heads are not normalised."""
        return None

    @property
    def norm_affine(self) -> bool:
        """Whether the norm has a weight: there is no norm."""
        return False

    @property
    def output_scale(self) -> float:
        """1: there is no factor."""
        return 1.0

    @property
    def lambda_init(self) -> float | None:
        """``None``: lambda has no constant part."""
        return None

    @property
    def has_norm(self) -> bool:
        """Whether each head's output is normalised: it is not."""
        return False

    @property
    def has_head_step(self) -> bool:
        """Whether a head is changed on its way to the output projection: it is not."""
        return False

    @property
    def constant_lambda(self) -> bool:
        """Whether lambda is one number: it is computed per token and head."""
        return False

    @property
    def streams_share_keys(self) -> bool:
        """Whether both streams of a head read the same keys: they do."""
        return True

    @property
    def permutes_key_streams(self) -> bool:
        """Whether the key map differs from the canonical one: it does not."""
        return False

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of this block, as `DiffAttentionV2.state_dict` has them."""
        kv_rows = self.num_kv_heads * self.head_dim
        norms = {} if self.qk_norm_eps is None else dict.fromkeys(("q_norm.weight", "k_norm.weight"), (self.head_dim,))
        return {
            # Two query streams per output head, in neighbouring rows; keys and values have one for both.
            "q_proj.weight": (2 * self.num_heads * self.head_dim, self.embed_dim),
            "k_proj.weight": (kv_rows, self.embed_dim),
            "v_proj.weight": (kv_rows, self.embed_dim),
            "out_proj.weight": (self.embed_dim, self.num_heads * self.head_dim),
            "lambda_proj.weight": (self.num_heads, self.embed_dim),
            **norms,
        }


AnyConfig = DiffAttentionConfig | DiffAttentionV2Config
