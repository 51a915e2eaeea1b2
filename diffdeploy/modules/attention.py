"""The canonical differential-attention blocks, in plain torch: the paper's and the second version's.

Shape suffixes: B batch, H heads, S query length, d stream width, e value width.
"""

from typing import Self

import torch
from torch import Tensor, nn

from diffdeploy.config import LAMBDA_VECTORS, AnyConfig, DiffAttentionConfig, DiffAttentionV2Config
from diffdeploy.modules.block import AttentionBlock, KeyValueCache, Rotation
from diffdeploy.ops import Impl
from diffdeploy.ops.request import HeadNorm

__all__ = ["AttentionBlock", "DiffAttention", "DiffAttentionV2", "KeyValueCache", "Rotation", "block_class"]


class DiffAttention(AttentionBlock):
    """Multi-head differential attention (arXiv 2410.05258, section 2.1 and figure 2).

    Row order of the weights: ``q_proj`` is ``[h, 2, d]``, ``k_proj`` ``[h_kv, 2, d]`` and ``v_proj`` ``[h_kv, 2d]``;
    the columns of ``out_proj`` are ``[h, 2d]``.

    The lambda vectors stay in fp32 (fp64 in a ``float64`` block) whatever ``dtype`` is, and lambda is rounded once:
    rounding the vectors to bf16 costs more accuracy than all other roundings on the way to lambda.

    Args:
        config: sizes and flags of the block.
        impl: implementation of the operator.
        max_positions: number of positions that can be embedded, if the config has rotary embedding.
        device: device of the parameters, as for any module.
        dtype: dtype of the projections and the norm; float64, float32, float16 or bfloat16.
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
        for name in LAMBDA_VECTORS if config.lambda_kind != "fixed" else ():
            vector = torch.empty(config.lambda_shape, device=device, dtype=lambda_dtype)
            # Meta tensors need no random numbers, and torch would import its compiler to draw them.
            if not vector.is_meta:
                nn.init.normal_(vector, std=0.1)
            self.register_parameter(name, nn.Parameter(vector))
        self.subln = (
            None
            if config.norm_eps is None
            else nn.RMSNorm(
                config.value_dim, config.norm_eps, elementwise_affine=config.norm_affine, device=device, dtype=dtype
            )
        )
        self._frozen_lambda: Tensor | None
        self.register_buffer("_frozen_lambda", None, persistent=False)

    def lambda_value(self) -> Tensor:
        """``exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init``, in at least fp32: a scalar, or ``[h]``, one per head."""
        if self.config.lambda_kind == "fixed":
            weight = self.out_proj.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return torch.full((), self.config.lambda_init, dtype=dtype, device=weight.device)
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (v.to(dtype) for v in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return torch.exp((q1 * k1).sum(-1)) - torch.exp((q2 * k2).sum(-1)) + self.config.lambda_init

    def freeze(self) -> Self:
        """Compute lambda once, for inference; later changes of the lambda vectors have no effect."""
        self._frozen_lambda = self.lambda_value().detach()
        return self

    def lambda_(self, hidden_states: Tensor) -> Tensor:
        """Lambda: one scalar for all tokens and heads, or one number per head, ``[1, h, S, 1]``."""
        value = self.lambda_value() if self._frozen_lambda is None else self._frozen_lambda
        return value if value.ndim == 0 else value[None, :, None, None].expand(1, -1, hidden_states.shape[1], 1)

    def attend_and_normalise(
        self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """See `AttentionBlock`; the operator receives the norm, since `fused` computes it in the same kernel."""
        subln, eps = self.subln, self.config.norm_eps
        # A subclass may replace either step; exporters replace a step, or the norm, of this instance alone.
        replaced = (
            type(subln) is not nn.RMSNorm
            or getattr(self.attend, "__func__", None) is not AttentionBlock.attend
            or getattr(self.normalise, "__func__", None) is not DiffAttention.normalise
        )
        if subln is None or eps is None or replaced:
            return super().attend_and_normalise(q_BHSd, k_BHTd, v_BHTe, lam, mask, causal=causal)
        norm = HeadNorm(eps, subln.weight, self.config.output_scale)
        return self._call_operator(q_BHSd, k_BHTd, v_BHTe, lam, mask, causal=causal, norm=norm)

    def normalise(self, heads: Tensor) -> Tensor:
        """RMS norm over each head, times ``1 - lambda_init`` (section 2.1, equation 3), where the model has them."""
        normalised: Tensor = heads if self.subln is None else self.subln(heads)
        return normalised * self.config.output_scale if self.config.has_head_step else heads


class DiffAttentionV2(AttentionBlock):
    """The second version (Microsoft unilm, Diff-Transformer-V2): ``P1 v - sigmoid(W x) P2 v``, without a norm.

    Row order of the weights: ``q_proj`` is ``[h, 2, d]``, ``k_proj`` and ``v_proj`` ``[h_kv, d]``, ``lambda_proj``
    ``[h]``; the columns of ``out_proj`` are ``[h, d]``. Both streams of a head read the same keys and values.
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

    def lambda_(self, hidden_states: Tensor) -> Tensor:
        """Lambda: a sigmoid for each token and head."""
        per_token_BSh: Tensor = self.lambda_proj(hidden_states)
        return per_token_BSh.sigmoid().transpose(1, 2)[..., None]


def block_class(config: AnyConfig) -> type[AttentionBlock]:
    """Module class that computes the block of a config."""
    return DiffAttention if isinstance(config, DiffAttentionConfig) else DiffAttentionV2
