"""The canonical differential-attention block, in plain torch."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from diffdeploy.config import DiffAttentionConfig
from diffdeploy.modules.rotary import RotaryEmbedding
from diffdeploy.ops import Impl, diff_attention

__all__ = ["DiffAttention"]


class DiffAttention(nn.Module):
    """Multi-head differential attention (arXiv 2410.05258, section 2.1 and figure 2).

    Row order of the weights: ``q_proj`` is ``[h, 2, d]``, ``k_proj`` ``[h_kv, 2, d]``, ``v_proj`` ``[h_kv, 2d]``,
    the columns of ``out_proj`` ``[h, 2d]``.

    The lambda vectors stay in fp32 (fp64 in a ``float64`` block), whatever ``dtype`` is, and lambda is rounded once:
    rounding the vectors to bf16 costs more accuracy than the whole rest of the lambda path.

    Args:
        config: sizes and flags.
        impl: how the two attentions are computed.
        max_positions: longest sequence, when the config has rotary embedding.
        device: as for any module.
        dtype: of the projections and the norm; float64, float32, float16 or bfloat16.
    """

    def __init__(
        self,
        config: DiffAttentionConfig,
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        dtype = dtype or torch.get_default_dtype()
        shapes = config.weight_shapes()

        def linear(name: str, bias: bool) -> nn.Linear:
            rows, columns = shapes[f"{name}.weight"]
            return nn.Linear(columns, rows, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear("q_proj", config.qkv_bias)
        self.k_proj = linear("k_proj", config.qkv_bias)
        self.v_proj = linear("v_proj", config.qkv_bias)
        self.out_proj = linear("out_proj", config.out_bias)
        self.lambda_q1: Tensor
        self.lambda_k1: Tensor
        self.lambda_q2: Tensor
        self.lambda_k2: Tensor
        lambda_dtype = torch.promote_types(dtype, torch.float32)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            vector = torch.empty(config.head_dim, device=device, dtype=lambda_dtype)
            self.register_parameter(name, nn.Parameter(nn.init.normal_(vector, std=0.1)))
        self.subln = nn.RMSNorm(
            config.value_dim, config.norm_eps, elementwise_affine=config.norm_affine, device=device, dtype=dtype
        )
        self.rotary = (
            RotaryEmbedding(config.rope, config.head_dim, max_positions, device=device, dtype=dtype)
            if config.rope
            else None
        )
        self._frozen_lambda: Tensor | None
        self.register_buffer("_frozen_lambda", None, persistent=False)

    @classmethod
    def from_weights(
        cls,
        config: DiffAttentionConfig,
        weights: Mapping[str, Tensor],
        *,
        impl: Impl | str = Impl.AUTO,
        max_positions: int = 4096,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Build a frozen block, in evaluation mode, from canonical weights.

        Args:
            config: sizes and flags.
            weights: tensors named and shaped as `DiffAttentionConfig.weight_shapes` says, of any floating dtype.
            impl: how the two attentions are computed.
            max_positions: longest sequence, when the config has rotary embedding.
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

    def lambda_value(self) -> Tensor:
        """``exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init``: a scalar in the dtype of the lambda vectors."""
        signal = torch.exp((self.lambda_q1 * self.lambda_k1).sum())
        noise = torch.exp((self.lambda_q2 * self.lambda_k2).sum())
        return signal - noise + self.config.lambda_init

    def freeze(self) -> Self:
        """Compute lambda once, for inference; later changes of the lambda vectors have no effect."""
        self._frozen_lambda = self.lambda_value().detach()
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend over one sequence per batch row.

        Args:
            hidden_states: ``[B, S, D]`` in the block's dtype.

        Returns:
            ``[B, S, D]``, same dtype.

        Raises:
            InputError: ``S`` exceeds ``max_positions`` of a block with rotary embedding.
        """
        config = self.config
        q_BHSd = self.q_proj(hidden_states).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        k_BHSd = self.k_proj(hidden_states).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        v_BHSe = self.v_proj(hidden_states).unflatten(-1, (-1, config.value_dim)).transpose(1, 2)
        if self.rotary is not None:
            q_BHSd, k_BHSd = self.rotary(q_BHSd), self.rotary(k_BHSd)
        lam = self.lambda_value() if self._frozen_lambda is None else self._frozen_lambda
        heads_BHSe = diff_attention(q_BHSd, k_BHSd, v_BHSe, lam, causal=config.causal, impl=self.impl)
        heads_BHSe = self.subln(heads_BHSe) * config.output_scale
        output: Tensor = self.out_proj(heads_BHSe.transpose(1, 2).flatten(2))
        return output
