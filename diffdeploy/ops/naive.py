"""The formula as the paper writes it: both probability matrices, their difference, then the values.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import Visibility

__all__ = ["chunked", "naive"]

# Scores of all half heads for one chunk of queries, in elements: what stays in a last-level cache (16 MiB in fp32).
_CHUNK_SCORES = 2**22
_FEWEST_ROWS, _MOST_ROWS = 64, 256


def naive(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """``(P1 - lam P2) v`` with materialised probabilities; softmax in at least fp32, all else in the dtype of ``q``.

    Source: arXiv 2410.05258, equation 1. See `diff_attention` for shapes.
    """
    return _difference(q_BHSd, *_whole_heads(q_BHSd, k_BHTd, v_BHTe, gqa_layout), lam, seen)


def chunked(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """`naive` for a few queries at a time, without the keys that none of them can see.

    The scores of a chunk stay in the cache, memory grows with the length alone, and both streams share one product
    with the values, of width ``2d`` as they are: 8 d operations per pair of a query and a key, where two attentions
    take 12 d and kernels for equal widths 16 d. Chunks of queries as in arXiv 2112.05682, with all keys in one.
    See `diff_attention` for shapes.
    """
    batch, half_heads, length, _ = q_BHSd.shape
    key_length = k_BHTd.shape[2]
    (signal, noise), v_BHTe = _whole_heads(q_BHSd, k_BHTd, v_BHTe, gqa_layout)
    fitting = _CHUNK_SCORES // max(1, batch * half_heads * key_length)
    rows = min(_MOST_ROWS, max(_FEWEST_ROWS, fitting))
    chunks = []
    for start in range(0, length, rows):
        queries = slice(start, min(start + rows, length))
        reach = seen.keys_of(queries, key_length)
        chunks.append(
            _difference(
                q_BHSd[:, :, queries],
                (signal[:, :, reach], noise[:, :, reach]),
                v_BHTe[:, :, reach],
                lam[:, :, queries] if lam.ndim == 4 and lam.shape[2] > 1 else lam,
                seen.of_rows(queries, reach),
            )
        )
    return torch.cat(chunks, dim=2)


def _whole_heads(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, gqa_layout: GqaLayout
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Keys of both streams and values, one of each for every query head."""
    num_heads = q_BHSd.shape[1] // 2
    signal, noise = (stream_heads(k_BHTd, v_BHTe, stream, num_heads, gqa_layout)[0] for stream in (0, 1))
    return (_repeated(signal, num_heads), _repeated(noise, num_heads)), _repeated(v_BHTe, num_heads)


def _repeated(side: Tensor, num_heads: int) -> Tensor:
    return side if side.shape[1] == num_heads else side.repeat_interleave(num_heads // side.shape[1], dim=1)


def _difference(q_BHSd: Tensor, keys: tuple[Tensor, Tensor], v_BHTe: Tensor, lam: Tensor, seen: Visibility) -> Tensor:
    num_heads = v_BHTe.shape[1]
    signal, noise = (
        _probabilities(q_BHSd[:, stream::2], keys[stream], seen.of_stream(stream, num_heads)) for stream in (0, 1)
    )
    return (signal - lam * noise) @ v_BHTe


def _probabilities(q_BHSd: Tensor, k_BHTd: Tensor, seen: Visibility) -> Tensor:
    scores_BHST = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHTd.transpose(-1, -2)
    if seen.is_causal:
        # The last query sees all keys; only as many keys as there are queries are hidden from any.
        length = q_BHSd.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q_BHSd.device).triu(1)
        scores_BHST[..., k_BHTd.shape[2] - length :].masked_fill_(hidden, float("-inf"))
    elif seen.mask is not None and seen.mask.dtype == torch.bool:
        scores_BHST = scores_BHST.masked_fill(~seen.mask, float("-inf"))
    elif seen.mask is not None:
        scores_BHST = scores_BHST + seen.mask
    softmax_dtype = torch.promote_types(q_BHSd.dtype, torch.float32)
    return seen.clear_dead(scores_BHST.softmax(dim=-1, dtype=softmax_dtype).to(q_BHSd.dtype))
