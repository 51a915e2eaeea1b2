"""Zero-padded queries over paired keys, and heads turned into rows, so that no kernel expands keys and values.

With keys ``[k1 | k2]``, differential attention is ordinary grouped-query attention of ``2h`` heads of width ``2d`` with
queries ``[q1 | 0]`` and ``[0 | q2]`` and scale ``d ** -0.5``. This is exact for finite keys, since the zeros add
nothing, but 0 times infinity is NaN. If one half of a pair is infinite, as after an overflow of float16, the other
stream becomes NaN as well, which two separate products would avoid. There is no guard against that, since a guard would
copy the keys. Either way, the head, which is the difference of both streams, is lost, unless every query that sees the
infinite key has a score of minus infinity for it.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.ops.heads import as_rows, equal_widths, from_rows
from diffdeploy.ops.masks import Visibility, kernel_mask
from diffdeploy.ops.request import Keys, Request

__all__ = ["attend_rows", "padded_queries"]

# Heads and rows are merged while the positions are an outer axis, so that their strides are constants. If positions
# were an inner axis, the strides of heads would contain the length, and merging them would add a guard in torch.export
# before 2.13, which does not know that min(6 s, 12 s) is 6 s.


def padded_queries(request: Request) -> Tensor:
    """Queries of all ``2h`` half heads in natural order, zero-padded for paired keys: ``[B, 2h, S, 2d]``.

    In the canonical key map, each stream occupies its own half. In the legacy map, half head ``m = 2i + s`` reads key
    half head ``m // g``, which is half ``(m // g) % 2`` of pair ``m // (2g)``: among the ``2g`` half heads of a group,
    the first ``g`` occupy the first half. Shared keys have no halves, and their queries stay unchanged.
    """
    if request.keys == Keys.SHARED:
        return request.q
    inner = request.group_size if request.permutes_key_streams else 1
    halves = torch.unflatten(request.q.transpose(1, 2), 2, (-1, 2, inner))
    # Multiplying by 0 and 1 takes one pass, while padding each half and joining them takes three. Moreover,
    # onnxruntime's padding kernel took half of the total time for a prompt on a GPU.
    place = torch.eye(2, dtype=halves.dtype, device=halves.device)[:, None, :, None]
    return (halves.unsqueeze(5) * place).contiguous().flatten(5).flatten(2, 4).transpose(1, 2)


def attend_rows(q_BHSe: Tensor, k_BHTe: Tensor, v_BHTe: Tensor, seen: Visibility, scale: float) -> Tensor:
    """Compute one softmax attention in which heads are rows of the key/value head they read, so nothing is expanded."""
    num_kv_heads = k_BHTe.shape[1]
    num_rows = q_BHSe.shape[1] // num_kv_heads
    seen = seen.of_rows(q_BHSe, num_kv_heads)
    output = F.scaled_dot_product_attention(
        *equal_widths(as_rows(q_BHSe, num_kv_heads), k_BHTe, v_BHTe),
        attn_mask=kernel_mask(q_BHSe, seen.mask),
        is_causal=seen.is_causal,
        scale=scale,
    )
    return from_rows(seen.clear_dead(output[..., : v_BHTe.shape[-1]]), num_rows)
