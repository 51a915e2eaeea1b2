"""Blocks that are correct for numbers near 1, but wrong for those in activations of language models.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.graphs import Stage
from diffdeploy.ops.masks import Visibility
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.conditions import causal

# Larger than any number that results from inputs near 1.
_LARGE = 50.0
# Number that masks of older models add to the scores instead of minus infinity.
_HIDDEN = -1e4


@faulty(
    "hidden_by_ten_thousand", "hidden scores are 1e4 lower, not minus infinity", Stage.SIGNAL, causal, family="values"
)
class HiddenByTenThousand(Steps):
    """Hidden scores are lowered by 1e4, not to minus infinity."""

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        mask = seen.mask
        if mask is None:
            mask = torch.ones(q_BHSd.shape[2], k_BHTd.shape[2], dtype=torch.bool).tril()[None, None]
        bias = torch.zeros((), dtype=q_BHSd.dtype).masked_fill(~mask, _HIDDEN)
        return super().softmax_attention(q_BHSd, k_BHTd, v_BHTe, Visibility(bias, dead=seen.dead))


@faulty("values_clamped_at_50", "values are clamped at 50 in the attentions", Stage.SIGNAL, family="values")
class ValuesClampedAt50(Steps):
    """Values are clamped at 50 in the attentions."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q, k, v.clamp(-_LARGE, _LARGE)


@faulty("queries_clamped_at_50", "queries are clamped at 50 in the attentions", Stage.SIGNAL, family="values")
class QueriesClampedAt50(Steps):
    """Queries are clamped at 50 in the attentions."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q.clamp(-_LARGE, _LARGE), k, v
