"""Blocks that are right for numbers near 1, and wrong for those that activations of language models hold.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.graphs import Stage
from diffdeploy.ops.masks import Visibility
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.conditions import causal

# Larger than any number that inputs near 1 make.
_LARGE = 50.0
# What masks of older models add to the scores, in place of minus infinity.
_HIDDEN = -1e4


@faulty(
    "hidden_by_ten_thousand", "hidden scores are 1e4 lower, not minus infinity", Stage.SIGNAL, causal, family="values"
)
class HiddenByTenThousand(Steps):
    """Hidden scores are 1e4 lower, not minus infinity."""

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        mask = seen.mask
        if mask is None:
            mask = torch.ones(q_BHSd.shape[2], k_BHTd.shape[2], dtype=torch.bool).tril()[None, None]
        bias = torch.zeros((), dtype=q_BHSd.dtype).masked_fill(~mask, _HIDDEN)
        return super().softmax_attention(q_BHSd, k_BHTd, v_BHTe, Visibility(bias, dead=seen.dead))


@faulty("values_clamped_at_50", "values end at 50 in the attentions", Stage.SIGNAL, family="values")
class ValuesClampedAt50(Steps):
    """Values end at 50 in the attentions."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q, k, v.clamp(-_LARGE, _LARGE)


@faulty("queries_clamped_at_50", "queries end at 50 in the attentions", Stage.SIGNAL, family="values")
class QueriesClampedAt50(Steps):
    """Queries end at 50 in the attentions."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q.clamp(-_LARGE, _LARGE), k, v
