"""Which key and value heads a stream reads.

Shape suffixes: B batch, H heads, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.config import GqaLayout

__all__ = ["shares_keys", "stream_heads"]


def shares_keys(k_BHTd: Tensor, v_BHTe: Tensor) -> bool:
    """Whether both streams read the same keys, as in the second version of differential attention."""
    return k_BHTd.shape[1] == v_BHTe.shape[1]


def stream_heads(
    k_BHTd: Tensor, v_BHTe: Tensor, stream: int, num_heads: int, gqa_layout: GqaLayout
) -> tuple[Tensor, Tensor]:
    """Keys and values of one stream: ``n`` of each, where query head ``i`` reads number ``i // (h / n)``.

    With ``g = h / h_kv``, canonical streams take every second key head, and nothing is copied. In the legacy layout
    query half head ``e = 2i + s`` reads key half head ``e // g``: for even ``g`` that is ``i // (g / 2)``, so each
    stream reads all ``2 h_kv`` key heads as they lie; for odd ``g`` the keys are gathered.

    Args:
        k_BHTd: ``2 h_kv`` key heads, stream ``s`` of head ``j`` at ``2j + s``; or ``h_kv`` shared ones.
        v_BHTe: ``h_kv`` value heads.
        stream: 0 or 1.
        num_heads: ``h``.
        gqa_layout: see `DiffAttentionConfig`.
    """
    if shares_keys(k_BHTd, v_BHTe):
        return k_BHTd, v_BHTe
    group_size = num_heads // v_BHTe.shape[1]
    if gqa_layout == "canonical" or group_size == 1:
        return k_BHTd[:, stream::2], v_BHTe
    if group_size % 2 == 0:
        return k_BHTd, v_BHTe.repeat_interleave(2, dim=1)
    read = torch.arange(stream, 2 * num_heads, 2, device=k_BHTd.device) // group_size
    return k_BHTd.index_select(1, read), v_BHTe.repeat_interleave(group_size, dim=1)
