"""The formula as the paper writes it: both probability matrices, their difference, then the values.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import Visibility
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Request

__all__ = ["chunked", "naive"]

# Maximum number of queries in a chunk.
_ROWS = 128
# Maximum number of scores of both streams that are computed at once. In fp32, they take 16 MiB, which fits into a
# last-level cache.
_SCORES = 2**22

# Number of queries below which `auto` selects another implementation.
_SHORTEST = 32


@register(Impl.NAIVE, num_attentions=2, cost=1.0)
def naive(request: Request) -> Tensor:
    """``(P1 - lam P2) v`` with materialised probabilities; softmax in at least fp32, the rest in the dtype of ``q``.

    Source: arXiv 2410.05258, equation 1. See `diff_attention` for shapes.
    """
    keys, v_BHTe = _whole_heads(request)
    seen = request.visibility()
    signal, noise = (
        _probabilities(request.q[:, stream::2], keys[stream], seen.of_stream(stream, request.num_heads), request.scale)
        for stream in (0, 1)
    )
    return (signal - request.lam * noise) @ v_BHTe


def _chunked_cost(request: Request) -> float:
    # From 512 positions on, it takes 0.5 to 0.66 of the time of `naive` (docs/operator-speed.md); with few queries,
    # `naive` is preferred. Matrix products are slow in float16 on CPUs, and training would keep all probabilities.
    slow = request.traced or request.dtype == torch.float16 or request.q.requires_grad
    if request.device != "cpu" or slow or request.length < _SHORTEST:
        return 1.1
    return 0.55


@register(Impl.CHUNKED, num_attentions=2, cost=_chunked_cost)
def chunked(request: Request) -> Tensor:
    """Compute `naive` for a few queries and heads at a time, leaving out keys that none of these queries can see.

    Scores stay in the cache, memory grows linearly with the length instead of quadratically, and both streams share one
    product with the values: 8 d operations per pair of query and key, compared with 12 d for two attentions and 16 d
    for kernels with equal widths. Queries are chunked as in arXiv 2112.05682, but keys are not. A traced graph contains
    `naive`, since the number of chunks is unknown there. See `diff_attention` for shapes.
    """
    if request.traced:
        return naive(request)
    q_BHSd, lam, seen = request.q, request.lam, request.visibility()
    batch, num_heads = q_BHSd.shape[0], request.num_heads
    length, key_length = request.length, request.key_length
    (first, second), v_BHTe = _whole_heads(request)
    seen_1, seen_2 = (seen.of_stream(stream, num_heads) for stream in (0, 1))
    at_once = max(1, _SCORES // max(1, 2 * batch * min(_ROWS, length) * key_length))
    groups = []
    for heads in _parts(num_heads, at_once):
        q_1, q_2 = (q_BHSd[:, stream::2][:, heads] for stream in (0, 1))
        chunks = []
        for queries in _parts(length, _ROWS):
            keys = seen.keys_of(queries, key_length)
            signal, noise = (
                _probabilities(q[:, :, queries], k[:, heads, keys], its_seen.part(heads, queries, keys), request.scale)
                for q, k, its_seen in ((q_1, first, seen_1), (q_2, second, seen_2))
            )
            factor = lam[:, heads, queries] if lam.ndim == 4 else lam
            chunks.append(torch.addcmul(signal, factor, noise, value=-1) @ v_BHTe[:, heads, keys])
        groups.append(_joined(chunks, dim=2))
    return _joined(groups, dim=1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _parts(size: int, at_once: int) -> Iterator[slice]:
    return (slice(start, min(start + at_once, size)) for start in range(0, size, at_once))


def _whole_heads(request: Request) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Keys of both streams, and values, expanded to one of each per query head."""
    num_heads = request.num_heads
    signal, noise = (_repeated(request.stream_heads(stream)[0], num_heads) for stream in (0, 1))
    return (signal, noise), _repeated(request.v, num_heads)


def _repeated(side: Tensor, num_heads: int) -> Tensor:
    return side if side.shape[1] == num_heads else side.repeat_interleave(num_heads // side.shape[1], dim=1)


def _probabilities(q_BHSd: Tensor, k_BHTd: Tensor, seen: Visibility, scale: float) -> Tensor:
    scores_BHST = (q_BHSd * scale) @ k_BHTd.transpose(-1, -2)
    if seen.is_causal:
        # The last query sees all keys, so causality can hide only the last keys, as many as there are queries.
        length = q_BHSd.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q_BHSd.device).triu(1)
        scores_BHST[..., k_BHTd.shape[2] - length :].masked_fill_(hidden, float("-inf"))
    elif seen.mask is not None and seen.mask.dtype == torch.bool:
        scores_BHST = scores_BHST.masked_fill(~seen.mask, float("-inf"))
    elif seen.mask is not None:
        scores_BHST = scores_BHST + seen.mask
    softmax_dtype = torch.promote_types(q_BHSd.dtype, torch.float32)
    return seen.clear_dead(scores_BHST.softmax(dim=-1, dtype=softmax_dtype).to(q_BHSd.dtype))
