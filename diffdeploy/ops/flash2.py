"""FlashAttention-2 from the ``flash-attn`` package, in eager mode on CUDA.

It requires queries, keys and values of equal width. Up to 128 channels, where its kernels are fast, one call computes
both streams as ``2h`` zero-padded heads over keys ``[k1 | k2]``, see `diffdeploy.ops.rows`. For wider values (``2d``),
each stream takes one call with zero-padding to ``2d``, or two calls with the values split into halves.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
The package's own layout has heads after positions: ``[B, S, H, d]``.
"""

from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops.heads import equal_widths, pair_streams
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import is_key_padding
from diffdeploy.ops.paired import paired
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Keys, Request
from diffdeploy.ops.rows import padded_queries

__all__ = ["Road", "flash2", "num_calls", "road_for", "unsupported", "unsupported_mask"]

_MAX_WIDTH = 256
_WIDEST_FAST = 128


class Road(StrEnum):
    """Way to give queries, keys and values equal widths."""

    TOGETHER = "together"
    PADDED = "padded"
    SPLIT = "split"


_NUM_CALLS = {Road.TOGETHER: 1, Road.PADDED: 2, Road.SPLIT: 4}


def road_for(width: int, value_width: int, *, shares_keys: bool) -> Road:
    """Return the preferred way to equalise these widths.

    Padding and splitting take the same number of multiplications, but splitting computes each exponential twice. Above
    width 128, the package's kernels have smaller tiles, which costs more than the second exponential.
    """
    if max(width if shares_keys else 2 * width, value_width) <= _WIDEST_FAST:
        return Road.TOGETHER
    return Road.SPLIT if value_width == 2 * width else Road.PADDED


def num_calls(width: int, value_width: int, *, shares_keys: bool) -> int:
    """Number of attention calls that `flash2` makes."""
    return _NUM_CALLS[road_for(width, value_width, shares_keys=shares_keys)]


def unsupported(request: Request) -> DiffDeployError | None:
    """Reason that FlashAttention-2 cannot run: the device, package, dtype, width or mask; ``None`` if it can."""
    if request.device != "cuda":
        return UnavailableError(f"flash2 runs on CUDA only, but the tensors are on {request.device}")
    if find_spec("flash_attn") is None:
        return UnavailableError("flash2 needs the package flash-attn, which is not installed")
    if request.dtype not in (torch.float16, torch.bfloat16):
        return InputError(f"flash2 runs in float16 and bfloat16, but the tensors are {request.dtype}")
    splits = _road(request) == Road.SPLIT
    width = max(request.width, request.value_width // 2 if splits else request.value_width)
    if width > _MAX_WIDTH or request.width % 8 or request.value_width % 8:
        return InputError(
            f"flash2 needs widths that are multiples of 8 and at most {_MAX_WIDTH} in each call, but streams and "
            f"values are {request.width} and {request.value_width} wide"
        )
    return unsupported_mask(request)


def unsupported_mask(request: Request) -> InputError | None:
    """Error for a mask, unless it hides the same keys from all queries, as padding does."""
    mask, key_length = request.attn_mask, request.key_length
    if mask is None or is_key_padding(mask, request.q.shape[0], key_length):
        return None
    return InputError(
        "flash2 supports only masks that hide the same keys from all queries; accepted: boolean "
        f"[B, 1, 1, {key_length}], but this one is {mask.dtype} {list(mask.shape)}"
    )


def _road(request: Request) -> Road:
    return road_for(request.width, request.value_width, shares_keys=request.keys == Keys.SHARED)


# Twice the time of `stacked_wide` (docs/operator-speed.md, H200, bfloat16, 2048 positions).
@register(Impl.FLASH2, num_attentions=2, supports=unsupported, cost=0.25)
def flash2(request: Request, *, road: Road | None = None) -> Tensor:
    """Call ``flash_attn_func`` or, if there is padding, ``flash_attn_with_kvcache``, which skips it.

    The package supports only left padding; batches that have padding elsewhere are computed by `paired`.

    Args:
        request: a request that `unsupported` does not reject.
        road: way to equalise the widths; `road_for` decides by default.
    """
    padding = None if request.attn_mask is None else _padding_before(request)
    if padding is None and request.attn_mask is not None:
        return paired(request)
    attend = _Attention(request, padding)
    road = _road(request) if road is None else road
    if road == Road.TOGETHER:
        keys = pair_streams(request.k) if request.keys == Keys.STREAMS else request.k
        output = attend(*equal_widths(padded_queries(request), keys, request.v))[..., : request.value_width]
        return output[:, 0::2] - request.lam * output[:, 1::2]
    outputs = []
    for stream in (0, 1):
        q_stream, (k_stream, v_stream) = request.q[:, stream::2], request.stream_heads(stream)
        values = [v_stream] if road == Road.PADDED else v_stream.chunk(2, dim=-1)
        parts = [attend(*equal_widths(q_stream, k_stream, part))[..., : part.shape[-1]] for part in values]
        outputs.append(torch.cat(parts, dim=-1))
    return outputs[0] - request.lam * outputs[1]


def _padding_before(request: Request) -> Tensor | None:
    """Number of left-padding keys in each row, int32 ``[B]``; ``None`` if there is padding after a token."""
    assert request.attn_mask is not None
    mask_BT = request.attn_mask.reshape(-1, request.key_length).expand(request.q.shape[0], request.key_length)
    if bool((mask_BT[:, :-1] & ~mask_BT[:, 1:]).any()):
        return None
    return (~mask_BT).sum(dim=1, dtype=torch.int32)


class _Attention:
    """One call of the package in this project's tensor layout."""

    def __init__(self, request: Request, padding: Tensor | None) -> None:
        import flash_attn

        self._package: Any = flash_attn
        window = request.sliding_window
        self._settings = {
            "softmax_scale": request.scale,
            "causal": request.causal,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
        }
        self._padding = padding
        self._lengths = None if padding is None else torch.full_like(padding, request.key_length)

    def __call__(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> Tensor:
        q, k, v = (side.transpose(1, 2) for side in (q_BHSd, k_BHTd, v_BHTe))
        output: Tensor
        if self._padding is None:
            output = self._package.flash_attn_func(q, k, v, **self._settings)
        else:
            output = self._package.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=self._lengths, cache_leftpad=self._padding, **self._settings
            )
        return output.transpose(1, 2)
