"""The steps of the formula that every block shares, as public methods.

Shape suffixes: B batch, H heads, S query length, P past length, T = P + S key length, d stream width, e value width.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError
from diffdeploy.modules.rotary import RotaryEmbedding
from diffdeploy.ops import Impl, diff_attention
from diffdeploy.ops.heads import pair_streams
from diffdeploy.ops.request import HeadNorm

__all__ = ["AttentionBlock", "KeyValueCache", "Rotation"]

Rotation = Callable[[Tensor], Tensor]


# Keys and values of past tokens, each stored once. Keys ``[B, h_kv, P, 2d]`` are rotated, with both streams of a head
# side by side, so that ordinary grouped-query attention can read them in place; in the second version, both streams
# share keys ``[B, h_kv, P, d]``. Values are ``[B, h_kv, P, e]``. Every exporter supports a plain tuple.
KeyValueCache = tuple[Tensor, Tensor]


class AttentionBlock(nn.Module):
    """Base class of both versions: projections, rotary embedding, cache, masks and the operator.

    The formula is computed in public steps, which exporters reuse and which faults of the self-test replace. In order:
    `normalise_queries`, `normalise_keys`, `rotate_queries`, `rotate_keys`, `append` to the cache or `write` into it,
    `key_mask`, `lambda_`, `attend`, `normalise`, `join`, `project`.

    Args:
        config: sizes and flags of the block.
        impl: implementation of the operator.
        max_positions: number of positions that can be embedded, if the config has rotary embedding.
        device: device of the parameters, as for any module.
        dtype: dtype of the projections; float64, float32, float16 or bfloat16.
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
        self.q_norm, self.k_norm = (
            None
            if config.qk_norm_eps is None
            else nn.RMSNorm(config.head_dim, config.qk_norm_eps, device=device, dtype=dtype)
            for _ in range(2)
        )
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
            config: sizes and flags of the block.
            weights: tensors of any floating dtype, with the names and shapes of ``config.weight_shapes()``.
            impl: implementation of the operator.
            max_positions: number of positions that can be embedded, if the config has rotary embedding.
            dtype: dtype of the block.
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
        """Compute once, for inference, everything that does not depend on the input."""
        return self

    def normalise_queries(self, q_BHSd: Tensor) -> Tensor:
        """RMS norm over each query stream, in models that have this norm."""
        return q_BHSd if self.q_norm is None else self.q_norm(q_BHSd)

    def normalise_keys(self, k_BHSd: Tensor) -> Tensor:
        """RMS norm over each key stream, in models that have this norm."""
        return k_BHSd if self.k_norm is None else self.k_norm(k_BHSd)

    def rotate_queries(self, q_BHSd: Tensor, rotate: Rotation) -> Tensor:
        """Rotary embedding of the queries."""
        return rotate(q_BHSd)

    def rotate_keys(self, k_BHSd: Tensor, rotate: Rotation) -> Tensor:
        """Rotary embedding of the new keys."""
        return rotate(k_BHSd)

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        """Concatenate past and new tokens into the cache that attention reads and the block returns.

        Raises:
            InputError: the shapes do not fit.
        """
        for name, old, side in zip(("key", "value"), past, new, strict=True):
            if old.ndim != 4 or (*old.shape[:2], old.shape[3]) != (*side.shape[:2], side.shape[3]):
                wanted = [*side.shape[:2], "P", side.shape[3]]
                raise InputError(f"past {name} has shape {list(old.shape)}; accepted: {wanted}")
        if past[0].shape[2] != past[1].shape[2]:
            raise InputError(f"past key holds {past[0].shape[2]} tokens, but past value holds {past[1].shape[2]}")
        return torch.cat((past[0], new[0]), dim=2), torch.cat((past[1], new[1]), dim=2)

    def write(self, buffers: KeyValueCache, new: KeyValueCache, total_length: int) -> KeyValueCache:
        """Write new tokens into buffers, after the past tokens in them.

        Args:
            buffers: keys and values ``[B, h_kv, capacity, w]``, which are changed in place.
            new: new keys and values ``[B, h_kv, S, w]``.
            total_length: number ``T`` of past and new tokens, at most the capacity.

        Returns:
            Views ``[B, h_kv, T, w]`` of the buffers, with past and new tokens.
        """
        places = torch.arange(total_length - new[0].shape[2], total_length, device=new[0].device)
        for buffer, side in zip(buffers, new, strict=True):
            buffer.index_copy_(2, places, side)
        return buffers[0][:, :, :total_length], buffers[1][:, :, :total_length]

    def key_mask(self, attention_mask: Tensor) -> Tensor:
        """Boolean mask ``[B, T]``, ``True`` for tokens."""
        return attention_mask.to(torch.bool)

    def lambda_(self, hidden_states: Tensor) -> Tensor:
        """Lambda: a scalar, or ``[B or 1, h, S, 1]``."""
        raise NotImplementedError

    def attend(
        self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Differential heads ``[B, h, S, e]``; keys that come from a cache are paired."""
        return self._call_operator(q_BHSd, k_BHTd, v_BHTe, lam, mask, causal=causal)

    def _call_operator(
        self,
        q_BHSd: Tensor,
        k_BHTd: Tensor,
        v_BHTe: Tensor,
        lam: Tensor,
        mask: Tensor | None,
        *,
        causal: bool,
        norm: HeadNorm | None = None,
    ) -> Tensor:
        return diff_attention(
            q_BHSd,
            k_BHTd,
            v_BHTe,
            lam,
            causal=causal,
            attn_mask=mask,
            sliding_window=self.config.sliding_window,
            gqa_layout=self.config.gqa_layout,
            scale=self.config.scale,
            norm=norm,
            impl=self.impl,
        )

    def attend_and_normalise(
        self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """`attend` and `normalise`, for which a block may use one kernel as long as neither step is replaced."""
        return self.normalise(self.attend(q_BHSd, k_BHTd, v_BHTe, lam, mask, causal=causal))

    def normalise(self, heads: Tensor) -> Tensor:
        """Normalise the ``e`` channels of each head and multiply them by a constant factor, where the model does so."""
        return heads

    def join(self, heads_BHSe: Tensor) -> Tensor:
        """Concatenate all heads, ``[B, S, H e]``."""
        return heads_BHSe.transpose(1, 2).flatten(2)

    def project(self, joined: Tensor) -> Tensor:
        """Apply the output projection."""
        output: Tensor = self.out_proj(joined)
        return output

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Any:
        """Compute attention over the sequence of each batch row.

        Args:
            hidden_states: input, ``[B, S, D]``, in the block's dtype.
            attention_mask: padding mask ``[B, T]`` (integer or boolean, 1 for tokens and 0 for padding), or a mask
                broadcastable to ``[B, 1 or h or 2h, S, T]`` (additive, or boolean with ``True`` for keys to keep). It
                is combined with the causal mask.
            position_ids: integer positions ``[B, S]`` for the rotary embedding; ``P .. P + S - 1`` by default.
            past_key_values: keys and values of past tokens, from an earlier call; ``P`` may be 0.

        Returns:
            Output ``[B, S, D]`` of the same dtype; with ``past_key_values``, also the `KeyValueCache` of ``T`` tokens.

        Raises:
            InputError: shapes do not fit, a cache is given without a mask, or positions exceed ``max_positions``.
        """
        past_length = 0
        if past_key_values is not None:
            if attention_mask is None:
                raise InputError("past_key_values needs an attention_mask [B, P + S] that marks tokens and padding")
            past_length = past_key_values[0].shape[2]
        rotary = self.rotary

        def rotate(x_BHSd: Tensor) -> Tensor:
            return x_BHSd if rotary is None else rotary(x_BHSd, position_ids, offset=past_length)

        output, cache = self.compute(hidden_states, attention_mask, rotate, past_key_values)
        return output if past_key_values is None else (output, cache)

    def compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotate: Rotation,
        past_key_values: KeyValueCache | None = None,
        *,
        causal: bool | None = None,
        total_length: int | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Compute all steps with the caller's rotary embedding.

        Args:
            hidden_states: input, see `forward`.
            attention_mask: mask as in `forward`, or ``None``.
            rotate: function that rotates queries and keys ``[B, H, S, d]``.
            past_key_values: cache as in `forward`, or ``None``.
            causal: value that overrides the config's ``causal``.
            total_length: length ``T``, if ``past_key_values`` are buffers that are updated in place, see `write`.

        Returns:
            Output ``[B, S, D]``, and the keys and values that were attended to; without ``past_key_values``, the keys
            are not paired: ``[B, 2 h_kv, S, d]``.

        Raises:
            InputError: the shapes do not fit.
        """
        config = self.config
        q_BHSd = self.rotate_queries(
            self.normalise_queries(_split_heads(self.q_proj(hidden_states), config.head_dim)), rotate
        )
        k_BHTd = self.rotate_keys(
            self.normalise_keys(_split_heads(self.k_proj(hidden_states), config.head_dim)), rotate
        )
        v_BHTe = _split_heads(self.v_proj(hidden_states), config.value_dim)
        if past_key_values is not None:
            new = k_BHTd if config.streams_share_keys else pair_streams(k_BHTd)
            k_BHTd, v_BHTe = (
                self.append(past_key_values, (new, v_BHTe))
                if total_length is None
                else self.write(past_key_values, (new, v_BHTe), total_length)
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            _check_key_mask(attention_mask, v_BHTe)
            attention_mask = self.key_mask(attention_mask)[:, None, None]
        causal = config.causal if causal is None else causal
        heads_BHSe = self.attend_and_normalise(
            q_BHSd, k_BHTd, v_BHTe, self.lambda_(hidden_states), attention_mask, causal=causal
        )
        return self.project(self.join(heads_BHSe)), (k_BHTd, v_BHTe)


def _split_heads(x_BSD: Tensor, width: int) -> Tensor:
    return x_BSD.reshape(*x_BSD.shape[:2], -1, width).transpose(1, 2)


def _check_key_mask(attention_mask: Tensor, v_BHTe: Tensor) -> None:
    batch, _, key_length, _ = v_BHTe.shape
    if attention_mask.is_floating_point() or attention_mask.shape != (batch, key_length):
        raise InputError(
            f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}; accepted: an integer or boolean "
            f"mask [{batch}, {key_length}], 1 for tokens and 0 for padding"
        )
