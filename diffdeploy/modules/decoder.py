"""A DIFF Transformer language model: the setting in which the block was published.

Shape suffixes: B batch, S new tokens, P past tokens, T = P + S, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from diffdeploy.config import DecoderConfig, LayerConfig
from diffdeploy.errors import InputError
from diffdeploy.modules.attention import block_class
from diffdeploy.modules.block import AttentionBlock, KeyValueCache, Rotation
from diffdeploy.modules.mlp import GatedMlp
from diffdeploy.modules.rotary import RotaryEmbedding, rotate
from diffdeploy.ops import Impl

__all__ = ["DecoderLayer", "DiffTransformer"]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection (arXiv 2410.05258, section 2.2).

    Args:
        config: config of the layer.
        embed_dim: model width ``D``.
        norm_eps: epsilon of both norms.
        impl: implementation of the operator.
        device: device of the parameters, as for any module.
        dtype: dtype of the parameters, as for any module.
    """

    def __init__(
        self,
        config: LayerConfig,
        embed_dim: int,
        norm_eps: float,
        *,
        impl: Impl | str = Impl.AUTO,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(embed_dim, norm_eps, device=device, dtype=dtype)
        # The block needs no rotary tables of its own: the decoder looks positions up once for all layers.
        self.self_attn: AttentionBlock = block_class(config.attention)(
            config.attention, impl=impl, max_positions=1, device=device, dtype=dtype
        )
        self.ffn_norm = nn.RMSNorm(embed_dim, norm_eps, device=device, dtype=dtype)
        self.ffn = GatedMlp(config.mlp, embed_dim, device=device, dtype=dtype)

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        rotate: Rotation,
        past: KeyValueCache | None,
        *,
        total_length: int | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Compute one layer.

        Args:
            x_BSD: output of the previous layer.
            attention_mask: see `AttentionBlock.forward`.
            rotate: function that rotates queries and keys ``[B, H, S, d]``.
            past: keys and values of past tokens, or ``None``.
            total_length: see `AttentionBlock.compute`.

        Returns:
            Output ``[B, S, D]``, and the keys and values that were attended to.
        """
        attended, cache = self.self_attn.compute(
            self.attention_norm(x_BSD), attention_mask, rotate, past, total_length=total_length
        )
        x_BSD = x_BSD + attended
        return x_BSD + self.ffn(self.ffn_norm(x_BSD)), cache


class DiffTransformer(nn.Module):
    """Decoder-only language model of differential-attention layers (arXiv 2410.05258, section 2).

    Args:
        config: sizes of the model.
        impl: implementation of the operator.
        max_positions: longest sequence, past included.
        device: device of the parameters, as for any module.
        dtype: float64, float32, float16 or bfloat16; the lambda vectors stay in at least float32.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        width, eps = config.embed_dim, config.norm_eps
        self.embedding = nn.Embedding(config.vocab_size, width, device=device, dtype=dtype)
        layers = [DecoderLayer(layer, width, eps, impl=impl, device=device, dtype=dtype) for layer in config.layers]
        # Items of a module list have no specific type.
        self.layers = cast("Sequence[DecoderLayer]", nn.ModuleList(layers))
        self.norm = nn.RMSNorm(width, eps, device=device, dtype=dtype)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tied:
            self.lm_head.weight = self.embedding.weight
        self.rotary: RotaryEmbedding | None = None
        self._share_tables(max_positions, device, dtype)

    def _share_tables(self, max_positions: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Create one pair of rotary tables for all layers."""
        attention = self.config.attention
        if attention.rope is None:
            return
        self.rotary = RotaryEmbedding(attention.rope, attention.head_dim, max_positions, device=device, dtype=dtype)
        for layer in self.layers:
            # A block that is called on its own uses the same tables.
            layer.self_attn.rotary = self.rotary

    @classmethod
    def from_weights(
        cls,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Build a frozen model in evaluation mode, which shares the memory of canonical weights of the same dtype.

        Args:
            config: sizes of the model.
            weights: tensors of any floating dtype, with the names and shapes of ``config.weight_shapes()``.
            impl: implementation of the operator.
            max_positions: longest sequence, past included.
            dtype: dtype of the model.
        """
        with torch.device("meta"):
            model = cls(config, impl=impl, max_positions=1, dtype=dtype)
        targets = model.state_dict()
        # A tied head has its own name in state dicts, but not among the canonical weights.
        named = {name: "embedding.weight" if config.tied and name == "lm_head.weight" else name for name in targets}
        cast = {name: weights[name].to(targets[name].dtype) for name in dict.fromkeys(named.values())}
        model.load_state_dict({name: cast[source] for name, source in named.items()}, assign=True)
        if config.tied:
            model.lm_head.weight = model.embedding.weight
        model._share_tables(max_positions, "cpu", dtype)
        model.requires_grad_(False)
        return model.eval().freeze()

    def freeze(self) -> Self:
        """Compute once, for inference, everything that does not depend on the input."""
        for layer in self.layers:
            layer.self_attn.freeze()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[KeyValueCache] | None = None,
        *,
        last_only: bool = False,
        in_place: bool = False,
    ) -> Any:
        """Predict the next token at every position.

        Args:
            input_ids: token ids ``[B, S]``, int64.
            attention_mask: padding mask ``[B, T]``, integer or boolean, 1 for tokens and 0 for padding on either side.
            position_ids: integer positions ``[B, S]``; ``P .. P + S - 1`` by default, regardless of the mask.
            past_key_values: keys and values of each layer, from an earlier call; ``P`` may be 0.
            last_only: true to return only the logits of the last position.
            in_place: true if ``past_key_values`` are buffers ``[B, h_kv, capacity, w]`` that begin with the past, into
                which new tokens are written; ``T`` is then the width of ``attention_mask``.

        Returns:
            Logits ``[B, S, vocab_size]`` or ``[B, 1, vocab_size]``; with ``past_key_values``, also the cache of ``T``
            tokens of each layer.

        Raises:
            InputError: shapes do not fit, a cache is given without a mask, or positions exceed ``max_positions``.
        """
        past_length, total_length = 0, None
        if past_key_values is not None:
            if len(past_key_values) != self.config.num_layers:
                raise InputError(
                    f"past_key_values has {len(past_key_values)} layers; accepted: {self.config.num_layers}"
                )
            if attention_mask is None:
                raise InputError("past_key_values needs an attention_mask [B, P + S] that marks tokens and padding")
            if in_place:
                total_length = attention_mask.shape[1]
                past_length = total_length - input_ids.shape[1]
            else:
                past_length = past_key_values[0][0].shape[2]
        turn = self.rotation(input_ids.shape[1], position_ids, past_length)
        x_BSD = self.embedding(input_ids)
        caches: list[KeyValueCache] = []
        for number, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[number]
            x_BSD, cache = layer(x_BSD, attention_mask, turn, past, total_length=total_length)
            caches.append(cache)
        if last_only:
            x_BSD = x_BSD[:, -1:]
        logits: Tensor = self.lm_head(self.norm(x_BSD))
        return logits if past_key_values is None else (logits, caches)

    def rotation(self, length: int, position_ids: Tensor | None, past_length: int) -> Rotation:
        """Function that rotates ``[B, H, S, d]`` by the positions of the new tokens, which are looked up once."""
        rotary = self.rotary
        if rotary is None:
            return lambda x_BHSd: x_BHSd
        cos, sin = rotary.tables(length, position_ids, offset=past_length)
        return lambda x_BHSd: rotate(x_BHSd, cos, sin, rotary.config.style)
