"""Differential attention as one ordinary attention over keys that are held side by side, ``[k1 | k2]``.

`diffdeploy.ops.rows` says why that is exact, and what it makes of keys that are not finite. Keys that are held apart
are paired first, which copies them.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.ops.heads import as_rows, pair_streams
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import Visibility
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Keys, Phase, Request
from diffdeploy.ops.rows import attend_rows, padded_queries
from diffdeploy.ops.sdpa import attend

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
    """One grouped-query attention of ``2h`` zero-padded heads over all keys. See `diff_attention` for shapes."""
    seen = request.visibility().of_half_heads(request.num_heads)
    output = attend(padded_queries(request), _paired_keys(request), request.v, seen, request.scale)
    return output[:, 0::2] - request.lam * output[:, 1::2]


def _rows_cost(request: Request) -> float:
    if request.device == "cuda":
        return 0.5
    if request.keys == Keys.STREAMS or request.phase == Phase.PREFILL:
        return 1.5
    return 0.3


@register(Impl.ROWS, num_attentions=1, cost=_rows_cost)
def rows(request: Request) -> Tensor:
    """`paired` with both streams of all heads of a group as rows, so that each key and value is read once.

    Made for one token; right for more, whose mask is repeated for each of the ``2g`` heads. See `diff_attention` for
    shapes.
    """
    q_BHSe, keys, v_BHTe = padded_queries(request), _paired_keys(request), request.v
    seen = request.visibility().of_half_heads(request.num_heads)
    if request.phase == Phase.DECODE and request.device == "cpu" and request.dtype in (torch.float32, torch.float64):
        return _two_products(request, q_BHSe, keys, seen)
    output = attend_rows(q_BHSe, keys, v_BHTe, seen, request.scale)
    return output[:, 0::2] - request.lam * output[:, 1::2]


def _two_products(request: Request, q_BHSe: Tensor, keys: Tensor, seen: Visibility) -> Tensor:
    """`rows` of one token as products: one with the keys, one with the values for ``P1 - lam P2`` (8 d, not 12 d).

    The keys are the left factor: with the queries on the left, MKL reads them at a third of the speed. It reads the
    values for two or three rows at a third of the speed of four, too, and for one at two thirds.
    """
    batch, num_kv_heads, group_size = keys.shape[0], request.num_kv_heads, request.group_size
    seen = seen.of_rows(q_BHSe, num_kv_heads)
    queries = as_rows(q_BHSe * request.scale, num_kv_heads)
    scores = (keys @ queries.transpose(2, 3)).transpose(2, 3).contiguous()
    if seen.mask is not None:
        boolean = seen.mask.dtype == torch.bool
        scores = scores.masked_fill(~seen.mask, float("-inf")) if boolean else scores + seen.mask
    probabilities = seen.clear_dead(scores.softmax(dim=-1))
    streams = probabilities.reshape(batch, num_kv_heads, group_size, 2, -1)
    lam = request.lam.reshape(-1, num_kv_heads, group_size, 1) if request.lam.ndim == 4 else request.lam
    difference = torch.addcmul(streams[:, :, :, 0], lam, streams[:, :, :, 1], value=-1)
    filled = F.pad(difference, (0, 0, 0, max(0, _FAST_ROWS - group_size)))
    return (filled @ request.v)[:, :, :group_size].reshape(batch, request.num_heads, 1, -1)
