"""The canonical differential-attention blocks, in plain torch: the paper's and the second version's.

Shape suffixes: B batch, H heads, S query length, P past length, T = P + S key length, d stream width, e value width.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffdeploy.config import LAMBDA_VECTORS, AnyConfig, DiffAttentionConfig, DiffAttentionV2Config
from diffdeploy.errors import InputError
from diffdeploy.modules.rotary import RotaryEmbedding
from diffdeploy.ops import Impl, diff_attention

__all__ = ["AttentionBlock", "DiffAttention", "DiffAttentionV2", "KeyValueCache", "block_class"]

Rotation = Callable[[Tensor], Tensor]


# Keys ``[B, 2 h_kv, P, d]`` (``[B, h_kv, P, d]`` in the second version), after rotary embedding, and values
# ``[B, h_kv, P, e]`` of past tokens, each held once. A plain tuple, so that every exporter takes it.
KeyValueCache = tuple[Tensor, Tensor]


class AttentionBlock(nn.Module):
    """What both versions share: projections, rotary embedding, cache, masks and the operator.

    Args:
        config: sizes and flags.
        impl: how the two attentions are computed.
        max_positions: positions that can be embedded, when the config has rotary embedding.
        device: as for any module.
        dtype: of the projections; float64, float32, float16 or bfloat16.
    """

    config: AnyConfig

    def __init__(
        self,
        config: AnyConfig,
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        shapes = config.weight_shapes()

        def linear(name: str) -> nn.Linear:
            rows, columns = shapes[f"{name}.weight"]
            return nn.Linear(columns, rows, bias=f"{name}.bias" in shapes, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear("q_proj"), linear("k_proj"), linear("v_proj")
        self.out_proj = linear("out_proj")
        self.rotary = (
            RotaryEmbedding(config.rope, config.head_dim, max_positions, device=device, dtype=dtype)
            if config.rope
            else None
        )

    @classmethod
    def from_weights(
        cls,
        config: AnyConfig,
        weights: Mapping[str, Tensor],
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Build a frozen block, in evaluation mode, from canonical weights.

        Args:
            config: sizes and flags.
            weights: tensors named and shaped as ``config.weight_shapes()`` says, of any floating dtype.
            impl: how the two attentions are computed.
            max_positions: positions that can be embedded, when the config has rotary embedding.
            dtype: of the block.
        """
        with torch.device("meta"):
            block = cls(config, impl=impl, max_positions=1, dtype=dtype)
        targets = block.state_dict()
        block.load_state_dict({name: weights[name].to(targets[name].dtype) for name in targets}, assign=True)
        if config.rope:
            block.rotary = RotaryEmbedding(config.rope, config.head_dim, max_positions, device="cpu", dtype=dtype)
        block.requires_grad_(False)
        return block.eval().freeze()

    def freeze(self) -> Self:
        """Compute once what does not depend on the input, for inference."""
        return self

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda: a scalar, or ``[B, h, S, 1]``."""
        raise NotImplementedError

    def _normalise(self, heads_BHSe: Tensor) -> Tensor:
        """What happens to the heads before they are joined."""
        return heads_BHSe

    def _normalise_queries(self, q_BHSd: Tensor) -> Tensor:
        return q_BHSd

    def _normalise_keys(self, k_BHSd: Tensor) -> Tensor:
        return k_BHSd

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Any:
        """Attend over the sequence of each batch row.

        Args:
            hidden_states: ``[B, S, D]`` in the block's dtype.
            attention_mask: ``[B, T]`` (integer or boolean, 1 is a token, 0 is padding), or a mask broadcastable to
                ``[B, 1 or h or 2h, S, T]`` (boolean, ``True`` is seen, or additive). It comes on top of causality.
            position_ids: integer ``[B, S]``, for the rotary embedding; by default ``P .. P + S - 1``.
            past_key_values: keys and values of past tokens, from an earlier call; ``P`` may be 0.

        Returns:
            ``[B, S, D]``, same dtype; with ``past_key_values`` a pair of that and the `KeyValueCache` of ``T`` tokens.

        Raises:
            InputError: shapes that do not fit, a past without a mask, or positions beyond ``max_positions``.
        """
        past_length = 0
        if past_key_values is not None:
            if attention_mask is None:
                raise InputError("past_key_values needs an attention_mask [B, P + S], which says what of it are tokens")
            past_length = past_key_values[0].shape[2]
        rotary = self.rotary

        def rotate(x_BHSd: Tensor) -> Tensor:
            return x_BHSd if rotary is None else rotary(x_BHSd, position_ids, offset=past_length)

        output, cache = self._attend(hidden_states, attention_mask, rotate, past_key_values)
        return output if past_key_values is None else (output, cache)

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotate: Rotation,
        past_key_values: KeyValueCache | None = None,
        *,
        causal: bool | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        config = self.config
        q_BHSd = rotate(self._normalise_queries(_split_heads(self.q_proj(hidden_states), config.head_dim)))
        k_BHTd = rotate(self._normalise_keys(_split_heads(self.k_proj(hidden_states), config.head_dim)))
        v_BHTe = _split_heads(self.v_proj(hidden_states), config.value_dim)
        if past_key_values is not None:
            k_BHTd, v_BHTe = _append(past_key_values, k_BHTd, v_BHTe)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = _key_padding(attention_mask, v_BHTe)
        heads_BHSe = diff_attention(
            q_BHSd,
            k_BHTd,
            v_BHTe,
            self._lambda(hidden_states),
            causal=config.causal if causal is None else causal,
            attn_mask=attention_mask,
            sliding_window=config.sliding_window,
            gqa_layout=config.gqa_layout,
            impl=self.impl,
        )
        joined = self._normalise(heads_BHSe).transpose(1, 2).flatten(2)
        return self.out_proj(joined), (k_BHTd, v_BHTe)


def _split_heads(x_BSD: Tensor, width: int) -> Tensor:
    return x_BSD.reshape(*x_BSD.shape[:2], -1, width).transpose(1, 2)


def _append(past: KeyValueCache, k_BHSd: Tensor, v_BHSe: Tensor) -> KeyValueCache:
    for name, old, new in zip(("key", "value"), past, (k_BHSd, v_BHSe), strict=True):
        if old.ndim != 4 or (*old.shape[:2], old.shape[3]) != (*new.shape[:2], new.shape[3]):
            wanted = [*new.shape[:2], "P", new.shape[3]]
            raise InputError(f"past {name} has shape {list(old.shape)}; accepted is {wanted}")
    if past[0].shape[2] != past[1].shape[2]:
        raise InputError(f"past key holds {past[0].shape[2]} tokens, and past value {past[1].shape[2]}")
    return torch.cat((past[0], k_BHSd), dim=2), torch.cat((past[1], v_BHSe), dim=2)


def _key_padding(attention_mask: Tensor, v_BHTe: Tensor) -> Tensor:
    batch, _, key_length, _ = v_BHTe.shape
    if attention_mask.is_floating_point() or attention_mask.shape != (batch, key_length):
        raise InputError(
            f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}; accepted is an integer or boolean "
            f"mask [{batch}, {key_length}], 1 for tokens and 0 for padding"
        )
    return attention_mask.to(torch.bool)[:, None, None]


class DiffAttention(AttentionBlock):
    """Multi-head differential attention (arXiv 2410.05258, section 2.1 and figure 2).

    Row order of the weights: ``q_proj`` is ``[h, 2, d]``, ``k_proj`` ``[h_kv, 2, d]``, ``v_proj`` ``[h_kv, 2d]``,
    the columns of ``out_proj`` ``[h, 2d]``.

    The lambda vectors stay in fp32 (fp64 in a ``float64`` block), whatever ``dtype`` is, and lambda is rounded once:
    rounding the vectors to bf16 costs more accuracy than the whole rest of the lambda path.

    Args:
        config: sizes and flags.
        impl: how the two attentions are computed.
        max_positions: positions that can be embedded, when the config has rotary embedding.
        device: as for any module.
        dtype: of the projections and the norm; float64, float32, float16 or bfloat16.
    """

    config: DiffAttentionConfig

    def __init__(
        self,
        config: DiffAttentionConfig,
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, impl=impl, max_positions=max_positions, device=device, dtype=dtype)
        self.lambda_q1: Tensor
        self.lambda_k1: Tensor
        self.lambda_q2: Tensor
        self.lambda_k2: Tensor
        lambda_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in LAMBDA_VECTORS:
            vector = torch.empty(config.head_dim, device=device, dtype=lambda_dtype)
            if not vector.is_meta:  # where random numbers are none, and torch would import its compiler for them
                nn.init.normal_(vector, std=0.1)
            self.register_parameter(name, nn.Parameter(vector))
        self.subln = nn.RMSNorm(
            config.value_dim, config.norm_eps, elementwise_affine=config.norm_affine, device=device, dtype=dtype
        )
        self.q_norm, self.k_norm = (
            None
            if config.qk_norm_eps is None
            else nn.RMSNorm(config.head_dim, config.qk_norm_eps, device=device, dtype=dtype)
            for _ in range(2)
        )
        self._frozen_lambda: Tensor | None
        self.register_buffer("_frozen_lambda", None, persistent=False)

    def lambda_value(self) -> Tensor:
        """``exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init``: a scalar, in at least fp32."""
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (v.to(dtype) for v in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.config.lambda_init

    def freeze(self) -> Self:
        """Compute lambda once, for inference; later changes of the lambda vectors have no effect."""
        self._frozen_lambda = self.lambda_value().detach()
        return self

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        return self.lambda_value() if self._frozen_lambda is None else self._frozen_lambda

    def _normalise_queries(self, q_BHSd: Tensor) -> Tensor:
        return q_BHSd if self.q_norm is None else self.q_norm(q_BHSd)

    def _normalise_keys(self, k_BHSd: Tensor) -> Tensor:
        return k_BHSd if self.k_norm is None else self.k_norm(k_BHSd)

    def _normalise(self, heads_BHSe: Tensor) -> Tensor:
        normalised: Tensor = self.subln(heads_BHSe)
        return normalised * self.config.output_scale


class DiffAttentionV2(AttentionBlock):
    """The second version (Microsoft unilm, Diff-Transformer-V2): ``P1 v - sigmoid(W x) P2 v``, without a norm.

    Row order of the weights: ``q_proj`` is ``[h, 2, d]``, ``k_proj`` and ``v_proj`` ``[h_kv, d]``, ``lambda_proj``
    ``[h]``, the columns of ``out_proj`` ``[h, d]``. Both streams of a head read the same keys and values.
    """

    config: DiffAttentionV2Config

    def __init__(
        self,
        config: DiffAttentionV2Config,
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, impl=impl, max_positions=max_positions, device=device, dtype=dtype)
        self.lambda_proj = nn.Linear(config.embed_dim, config.num_heads, bias=False, device=device, dtype=dtype)

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        per_token_BSh: Tensor = self.lambda_proj(hidden_states)
        return per_token_BSh.sigmoid().transpose(1, 2)[..., None]


def block_class(config: AnyConfig) -> type[AttentionBlock]:
    """The module that computes what a config describes."""
    return DiffAttention if isinstance(config, DiffAttentionConfig) else DiffAttentionV2
