"""Select the key and value heads of a stream, pair or separate keys, and reshape heads into rows.

A half head is one stream of a differential head: half head ``2i + s`` is stream ``s`` of head ``i``.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.config import GqaLayout

__all__ = [
    "JOINED_AXES_BECOME_GUARDS",
    "as_rows",
    "equal_widths",
    "from_rows",
    "pair_streams",
    "repeat_heads",
    "separate_streams",
    "stream_heads",
]

# Before torch 2.13, torch.export does not know that min(6 s, 12 s) is 6 s, and adds a guard for it. Such minima appear
# in the strides of joined axes.
JOINED_AXES_BECOME_GUARDS = torch.__version__ < "2.13"  # TorchVersion compares versions


def pair_streams(k_BHTd: Tensor) -> Tensor:
    """Join keys ``[B, 2 h_kv, T, d]``, stream ``s`` of head ``j`` at ``2j + s``, into pairs ``[B, h_kv, T, 2d]``."""
    return torch.unflatten(k_BHTd, 1, (-1, 2)).transpose(2, 3).flatten(3)


def separate_streams(k_BHTd: Tensor) -> Tensor:
    """Invert `pair_streams`; the result is a copy."""
    return torch.unflatten(k_BHTd, 3, (2, -1)).transpose(2, 3).flatten(1, 2)


def equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad queries, keys and values to the widest of them, as FlashAttention and fused CPU kernels require.

    This is exact: zeros add nothing to a score, and padded output channels are 0. In the paper's block, paired keys and
    values already have width ``2d``, so nothing is padded.
    """
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (side if side.shape[-1] == width else F.pad(side, (0, width - side.shape[-1])) for side in (q, k, v))
    return q, k, v


def repeat_heads(side_BHTe: Tensor, times: int) -> Tensor:
    """Repeat each head consecutively, ``[B, times H, T, e]``."""
    if not JOINED_AXES_BECOME_GUARDS:
        return side_BHTe.repeat_interleave(times, dim=1)
    read = torch.arange(times * side_BHTe.shape[1], device=side_BHTe.device) // times
    return side_BHTe.index_select(1, read)


def stream_heads(
    k_BHTd: Tensor, v_BHTe: Tensor, stream: int, *, width: int, num_heads: int, gqa_layout: GqaLayout
) -> tuple[Tensor, Tensor]:
    """Keys and values of one stream, ``n`` heads of each; query head ``i`` reads head ``i // (h / n)``.

    In the canonical layout, each stream reads every second key head, or half of each pair, and nothing is copied. In
    the legacy layout, with ``g = h / h_kv``, query half head ``m = 2i + s`` reads key half head ``m // g``. For even
    ``g`` that is ``i // (g / 2)``, so each stream reads all ``2 h_kv`` key heads in place; for odd ``g`` the keys are
    gathered.

    Args:
        k_BHTd: ``2 h_kv`` key heads, stream ``s`` of head ``j`` at ``2j + s``; or ``h_kv`` pairs of twice the width; or
            ``h_kv`` shared key heads.
        v_BHTe: ``h_kv`` value heads.
        stream: 0 or 1.
        width: width ``d`` of a stream, which distinguishes pairs from shared keys.
        num_heads: number of heads ``h``.
        gqa_layout: map from query streams to key streams; see `DiffAttentionConfig`.
    """
    num_kv_heads = v_BHTe.shape[1]
    paired = k_BHTd.shape[3] == 2 * width
    if k_BHTd.shape[1] == num_kv_heads and not paired:
        return k_BHTd, v_BHTe
    group_size = num_heads // num_kv_heads
    if gqa_layout == "canonical" or group_size == 1:
        return k_BHTd[..., stream * width : (stream + 1) * width] if paired else k_BHTd[:, stream::2], v_BHTe
    if paired:
        k_BHTd = separate_streams(k_BHTd)
    if group_size % 2 == 0:
        return k_BHTd, repeat_heads(v_BHTe, 2)
    read = torch.arange(stream, 2 * num_heads, 2, device=k_BHTd.device) // group_size
    return k_BHTd.index_select(1, read), repeat_heads(v_BHTe, group_size)


# Rows of one position are adjacent, so that only axes of known size have to be merged. The data are always copied
# first. In a trace, any other order would add a guard on whether heads and positions can be merged in place.


def as_rows(q_BHSe: Tensor, num_kv_heads: int) -> Tensor:
    """Turn heads ``[B, H, S, e]`` into rows of the key/value heads that they read, ``[B, h_kv, S H / h_kv, e]``."""
    grouped = torch.unflatten(q_BHSe, 1, (num_kv_heads, -1)).transpose(2, 3)
    return grouped.clone(memory_format=torch.contiguous_format).flatten(2, 3)


def from_rows(output: Tensor, num_rows: int) -> Tensor:
    """Invert `as_rows`, for ``num_rows`` heads per key/value head."""
    by_position = torch.unflatten(output, 2, (-1, num_rows)).transpose(1, 2)
    return by_position.clone(memory_format=torch.contiguous_format).flatten(2, 3).transpose(1, 2)
