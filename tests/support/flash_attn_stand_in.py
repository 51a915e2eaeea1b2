"""A stand-in for the package flash-attn, for machines without a GPU: its semantics, in loops over rows.

It has the call layout of flash-attn 2.8 (``[B, S, H, d]``, or packed tokens with cumulative lengths), equal head widths
only, causal masks aligned bottom-right, windows as ``(left, right)``, and 0 for rows that see nothing. It proves which
calls are made and how; the tests marked ``gpu`` run the real package.
"""

import torch
from torch import Tensor

calls: list[str] = []


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    calls.append("flash_attn_func")
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[2] % k.shape[2] == 0
    assert k.shape[2] == v.shape[2]
    out = torch.zeros_like(q)
    length, key_length, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    left, right = window_size
    if causal:
        right = 0
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            for i in range(length):
                here = key_length - length + i
                first = 0 if left < 0 else max(0, here - left)
                last = key_length if right < 0 else min(key_length, here + right + 1)
                if first >= last:
                    continue
                scores = (k[b, first:last, head // group] @ q[b, i, head]) * softmax_scale
                out[b, i, head] = scores.softmax(0) @ v[b, first:last, head // group]
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    parts = []
    for row in range(len(cu_seqlens_q) - 1):
        mine = slice(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1]))
        parts.append(
            flash_attn_func(
                q[None, mine],
                k[None, mine],
                v[None, mine],
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
            )[0]
        )
    calls.append("flash_attn_varlen_func")
    return torch.cat(parts)
