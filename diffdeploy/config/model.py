"""Every size and flag of a whole decoder: each of its layers, and the parts around them."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from diffdeploy.config.block import DiffAttentionConfig, lambda_init_at
from diffdeploy.config.block_v2 import AnyConfig
from diffdeploy.config.requirement import require
from diffdeploy.config.rope import RopeConfig
from diffdeploy.errors import InputError

__all__ = ["POLYNORM_EPS", "AnyModel", "DecoderConfig", "LayerConfig", "MlpConfig", "MlpKind"]

MlpKind = Literal["swiglu", "polynorm"]

# Epsilon of PolyNorm, which Motif's code fixes and no config contains.
POLYNORM_EPS = 1e-6

# PolyNorm has one weight each for the cube, the square and the number itself.
_NUM_POWERS = 3


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Config of a layer's gated MLP, ``W_down(act(W_gate x) * W_up x)``.

    Attributes:
        kind: ``swiglu``, where ``act`` is SiLU (arXiv 2002.05202, section 2), or ``polynorm``, where ``act`` is
            `diffdeploy.modules.mlp.PolyNorm`, as in Motif.
        hidden_dim: width ``I`` between the projections.
        bias: true if the projections have biases.
    """

    hidden_dim: int
    kind: MlpKind = "swiglu"
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.kind in get_args(MlpKind), "mlp.kind", self.kind, "swiglu or polynorm")
        require(self.hidden_dim >= 1, "mlp.hidden_dim", self.hidden_dim, "a positive integer")

    def weight_shapes(self, embed_dim: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the MLP's weights in a model of width ``embed_dim``."""
        rows = {"gate_proj": self.hidden_dim, "up_proj": self.hidden_dim, "down_proj": embed_dim}
        columns = {"gate_proj": embed_dim, "up_proj": embed_dim, "down_proj": self.hidden_dim}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows[name], columns[name]) for name in rows}
        if self.bias:
            shapes |= {f"{name}.bias": (rows[name],) for name in rows}
        if self.kind == "polynorm":
            shapes |= {"act.weight": (_NUM_POWERS,), "act.bias": (1,)}
        return shapes


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Config of one layer, ``x + attention(norm(x))`` followed by ``x + mlp(norm(x))``."""

    attention: AnyConfig
    mlp: MlpConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Config of a decoder-only language model with pre-norm layers (arXiv 2410.05258, section 2.2).

    Attributes:
        vocab_size: number of tokens.
        embed_dim: model width ``D``.
        layers: configs of the layers, from the embedding to the head. All caches have the same shape and all layers the
            same rotary embedding; lambda, windows and MLPs may differ.
        norm_eps: epsilon of the RMS norms around the blocks, which have weights.
        tied: true if the head shares the embedding's weights.
        version: distinguishes this config from those of blocks when they are read from JSON.

    Raises:
        InputError: a field is out of range, or layers are incompatible; the message names the field or the layer.
    """

    vocab_size: int
    embed_dim: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float = 1e-5
    tied: bool = False
    version: Literal["decoder"] = "decoder"

    def __post_init__(self) -> None:
        require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "a positive integer")
        require(len(self.layers) >= 1, "layers", len(self.layers), "at least one layer")
        eps = self.norm_eps
        require(math.isfinite(eps) and eps > 0, "norm_eps", eps, "a positive number")
        first = self.attention
        for number, layer in enumerate(self.layers):
            require(layer.attention.embed_dim == self.embed_dim, "embed_dim", self.embed_dim, "that of every layer")
            require(layer.attention.causal, f"causal of layer {number}", False, "True: a decoder sees no later token")
            if difference := _difference(first, layer.attention):
                raise InputError(
                    f"layer {number} differs from layer 0 in its {difference}; a decoder has layers of one kind, and "
                    "--layer exports one of them"
                )

    @property
    def attention(self) -> AnyConfig:
        """Block of the first layer; its cache shape and its positions are the same in all layers."""
        return self.layers[0].attention

    @property
    def blocks(self) -> dict[str, AnyConfig]:
        """Block configs of the layers, by the prefix of their weight names."""
        return {f"layers.{number}.self_attn.": layer.attention for number, layer in enumerate(self.layers)}

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the canonical weights, as in `DiffTransformer.state_dict`."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, self.embed_dim)}
        for number, layer in enumerate(self.layers):
            parts = {
                "attention_norm.weight": (self.embed_dim,),
                **{f"self_attn.{name}": shape for name, shape in layer.attention.weight_shapes().items()},
                "ffn_norm.weight": (self.embed_dim,),
                **{f"ffn.{name}": shape for name, shape in layer.mlp.weight_shapes(self.embed_dim).items()},
            }
            shapes |= {f"layers.{number}.{name}": shape for name, shape in parts.items()}
        shapes["norm.weight"] = (self.embed_dim,)
        return shapes if self.tied else {**shapes, "lm_head.weight": (self.vocab_size, self.embed_dim)}

    @classmethod
    def of_paper(
        cls,
        *,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        rope: RopeConfig,
        norm_eps: float = 1e-5,
    ) -> Self:
        """Create the decoder of the paper: heads twice as wide as the softmax model's, lambda_init by depth, SwiGLU.

        Args:
            vocab_size: number of tokens.
            embed_dim: model width ``D``.
            num_layers: number of decoder layers.
            num_heads: number of differential heads ``h`` per layer, each ``D / h`` wide at its output.
            num_kv_heads: number of differential key/value heads ``h_kv``.
            ffn_dim: hidden width of the SwiGLU; ``8/3 D`` in the paper.
            rope: rotary embedding of all layers.
            norm_eps: epsilon of every RMS norm, including those of the heads.
        """
        layers = tuple(
            LayerConfig(
                attention=DiffAttentionConfig(
                    embed_dim=embed_dim,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=embed_dim // num_heads // 2,
                    lambda_init=lambda_init_at(depth),
                    output_scale=1 - lambda_init_at(depth),
                    rope=rope,
                    norm_eps=norm_eps,
                ),
                mlp=MlpConfig(hidden_dim=ffn_dim),
            )
            for depth in range(num_layers)
        )
        return cls(vocab_size=vocab_size, embed_dim=embed_dim, layers=layers, norm_eps=norm_eps)


AnyModel = AnyConfig | DecoderConfig


def _difference(one: AnyConfig, other: AnyConfig) -> str | None:
    """Name of the first field that all layers must share and in which two blocks differ; ``None`` if there is none."""
    if isinstance(other, DiffAttentionConfig) and isinstance(one, DiffAttentionConfig):
        other = replace(other, lambda_init=one.lambda_init, output_scale=one.output_scale)
    if type(one) is not type(other):
        return "version of differential attention"
    other = replace(other, sliding_window=one.sliding_window)
    return next((name for name in vars(one) if getattr(one, name) != getattr(other, name)), None)
