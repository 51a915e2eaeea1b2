"""A stand-in for the package flash-attn, for machines without a GPU: its semantics, in loops over rows.

It has the call layout of flash-attn 2.8 (``[B, S, H, d]``; in a cache, the keys of a row lie between two positions). It
supports only equal head widths, aligns causal masks bottom-right, takes windows as ``(left, right)``, and returns 0 for
rows that see nothing. It shows which calls are made and how; the tests marked ``gpu`` run the real package.
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


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    assert cache_seqlens.dtype == cache_leftpad.dtype == torch.int32
    rows = []
    for row, (end, start) in enumerate(zip(cache_seqlens.tolist(), cache_leftpad.tolist(), strict=True)):
        rows.append(
            flash_attn_func(
                q[row, None],
                k_cache[row, None, start:end],
                v_cache[row, None, start:end],
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
            )
        )
        calls.pop()
    calls.append("flash_attn_with_kvcache")
    return torch.cat(rows)
