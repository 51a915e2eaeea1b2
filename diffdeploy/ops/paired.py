"""Differential attention as one ordinary attention over paired keys, ``[k1 | k2]``.

`diffdeploy.ops.rows` explains why this is exact and what happens if keys are not finite. Separate keys are paired
first, which copies them.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.ops.heads import as_rows, equal_widths, from_rows, pair_streams
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import Visibility
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Keys, Phase, Request
from diffdeploy.ops.rows import attend_rows, padded_queries
from diffdeploy.ops.sdpa import attend
from diffdeploy.ops.target import runs_on_cuda

__all__ = ["paired", "rows"]

_FAST_ROWS = 4


def _paired_keys(request: Request) -> Tensor:
    return pair_streams(request.k) if request.keys == Keys.STREAMS else request.k


def _paired_cost(request: Request) -> float:
    if request.device != "cuda":
        return 1.5
    return 0.3 if request.keys == Keys.STREAMS else 0.08


@register(Impl.PAIRED, num_attentions=1, cost=_paired_cost)
def paired(request: Request) -> Tensor:
    """Compute one grouped-query attention of ``2h`` zero-padded heads. See `diff_attention` for shapes."""
    seen = request.visibility().of_half_heads(request.num_heads)
    sides = equal_widths(padded_queries(request), _paired_keys(request), request.v)
    output = attend(*sides, seen, request.scale)[..., : request.value_width]
    return output[:, 0::2] - request.lam * output[:, 1::2]


def _rows_cost(request: Request) -> float:
    if request.device == "cuda":
        return 0.5
    if request.keys == Keys.STREAMS or request.phase == Phase.PREFILL:
        return 1.5
    return 0.3


@register(Impl.ROWS, num_attentions=1, cost=_rows_cost)
def rows(request: Request) -> Tensor:
    """Compute `paired` with both streams of all heads of a group as rows, so that keys and values are read only once.

    It is meant for one token. It is also correct for more tokens, but repeats their mask for each of the ``2g`` heads.
    An fp32 graph exported for a CPU contains both variants below and selects one by the number of queries. See
    `diff_attention` for shapes.
    """
    scale, past_length = request.scale, request.key_length - request.length
    seen = request.visibility().of_half_heads(request.num_heads)
    operands = (padded_queries(request), _paired_keys(request), request.v, request.lam, seen.mask, seen.dead)

    # Operands of a condition must be tensors, and both branches must return the same memory layout.
    def one_attention(
        q_BHSe: Tensor, keys: Tensor, v_BHTe: Tensor, lam: Tensor, mask: Tensor | None, dead: Tensor | None
    ) -> Tensor:
        output = attend_rows(q_BHSe, keys, v_BHTe, replace(seen, mask=mask, dead=dead), scale)
        difference: Tensor = output[:, 0::2] - lam * output[:, 1::2]
        return difference.contiguous()

    def two_products(
        q_BHSe: Tensor, keys: Tensor, v_BHTe: Tensor, lam: Tensor, mask: Tensor | None, dead: Tensor | None
    ) -> Tensor:
        its_seen = replace(seen, mask=mask, dead=dead)
        return _two_products(q_BHSe * scale, keys, v_BHTe, lam, its_seen, past_length).contiguous()

    if runs_on_cuda(request.q) or request.dtype not in (torch.float32, torch.float64):
        return one_attention(*operands)
    # Before torch 2.13, is_exporting is also true during torch.compile.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        chosen: Tensor = torch.cond(request.length == 1, two_products, one_attention, operands)
        return chosen
    # torch.compile specialises its graph for sizes of 1 anyway, so this comparison adds no guard there.
    return (two_products if request.length == 1 else one_attention)(*operands)


def _two_products(
    q_BHSe: Tensor, keys: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, past_length: int
) -> Tensor:
    """Compute `rows` with two products, one with the keys and one of ``P1 - lam P2`` with the values.

    This takes 8 d operations per pair of query and key, compared with 12 d for two attentions. The keys are the left
    factor: with the queries on the left, MKL reads keys at a third of the speed. MKL reads the values for four rows
    three times as fast as for two or three rows, and 1.5 times as fast as for one row.
    """
    batch, half_heads, length, _ = q_BHSe.shape
    num_kv_heads = keys.shape[1]
    group_size = half_heads // 2 // num_kv_heads
    # The key length is written as a sum of past and new tokens, since inductor's Python wrapper must know both.
    key_length = past_length + length
    seen = seen.of_rows(q_BHSe, num_kv_heads)
    scores = (keys @ as_rows(q_BHSe, num_kv_heads).transpose(2, 3)).transpose(2, 3).contiguous()
    if seen.mask is not None:
        boolean = seen.mask.dtype == torch.bool
        scores = scores.masked_fill(~seen.mask, float("-inf")) if boolean else scores + seen.mask
    probabilities = seen.clear_dead(scores.softmax(dim=-1))
    signal, noise = probabilities.reshape(batch, num_kv_heads, length * group_size, 2, key_length).unbind(3)
    factor = as_rows(lam, num_kv_heads) if lam.ndim == 4 else lam
    difference = torch.addcmul(signal, factor, noise, value=-1)
    if group_size < _FAST_ROWS:
        filling = _FAST_ROWS - group_size
        return from_rows((F.pad(difference, (0, 0, 0, filling)) @ v_BHTe)[:, :, :-filling], group_size)
    return from_rows(difference @ v_BHTe, group_size)
