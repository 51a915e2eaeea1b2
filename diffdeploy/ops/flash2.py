"""FlashAttention-2 through the ``flash-attn`` package, eagerly on CUDA.

It requires queries, keys and values of equal width. Values of width ``2d`` are handled in one of two ways: queries and
keys are zero-padded to ``2d`` (two calls), or the values are split into halves (four calls). Other widths are padded.

Shape suffixes: B batch, H heads, S query length, T key length, N tokens without padding, d stream width, e value width.
The package's own layout has heads after positions: ``[B, S, H, d]``.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import is_key_padding
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Request

__all__ = ["flash2", "num_calls", "pads", "unsupported", "unsupported_mask"]

_MAX_WIDTH = 256
_WIDEST_FAST = 128
_STREAMS = 2


def pads(width: int, value_width: int) -> bool:
    """True if zero-padding (two calls of width ``e``) is preferred to splitting the values (four calls of width ``d``).

    Both take 16 d multiplications and additions per query and key, but padding computes each exponential once, not
    twice. Above width 128 the kernels of the package have smaller tiles, which costs more than that saves.
    """
    return value_width not in (width, 2 * width) or width < value_width <= _WIDEST_FAST


def num_calls(width: int, value_width: int) -> int:
    """Number of attentions that `flash2` runs: one per stream, or two if the values are split."""
    return _STREAMS if width == value_width or pads(width, value_width) else 2 * _STREAMS


def unsupported(request: Request) -> DiffDeployError | None:
    """Reason that FlashAttention-2 cannot run: the device, package, dtype, width or mask; ``None`` if it can."""
    if request.device != "cuda":
        return UnavailableError(f"flash2 runs on CUDA only, but the tensors are on {request.device}")
    if find_spec("flash_attn") is None:
        return UnavailableError("flash2 needs the package flash-attn, which is not installed")
    if request.dtype not in (torch.float16, torch.bfloat16):
        return InputError(f"flash2 runs in float16 and bfloat16, but the tensors are {request.dtype}")
    splits = num_calls(request.width, request.value_width) != _STREAMS
    width = max(request.width, request.value_width // 2 if splits else request.value_width)
    if width > _MAX_WIDTH or request.width % 8 or request.value_width % 8:
        return InputError(
            f"flash2 has kernels for head widths that are multiples of 8 up to {_MAX_WIDTH}, but this one is {width}"
        )
    return unsupported_mask(request)


def unsupported_mask(request: Request) -> InputError | None:
    """Error for a mask, unless it hides the same keys from all queries, as padding does, and `S` equals `T`."""
    mask, length, key_length = request.attn_mask, request.length, request.key_length
    if mask is None:
        return None
    if not is_key_padding(mask, request.q.shape[0], key_length):
        return InputError(
            f"flash2 takes masks that hide the same keys from all queries, boolean [B, 1, 1, {key_length}], but this "
            f"one is {mask.dtype} {list(mask.shape)}"
        )
    if length != key_length:
        return InputError(
            f"flash2 takes padding only when queries and keys are the same tokens, but there are {length} queries and "
            f"{key_length} keys"
        )
    return None


# Twice the time of `stacked_wide` (docs/operator-speed.md, H200, bfloat16, 2048 positions).
@register(Impl.FLASH2, num_attentions=2, supports=unsupported, cost=0.25)
def flash2(request: Request, *, pad: bool | None = None) -> Tensor:
    """Compute with ``flash_attn_func``, or ``flash_attn_varlen_func`` if there is padding, whose rows return 0.

    Args:
        request: a request that `unsupported` does not reject.
        pad: true to pad, false to split the values; `pads` decides by default.
    """
    width, value_width = request.width, request.value_width
    if pad is None:
        pad = pads(width, value_width)
    settings = {
        "softmax_scale": request.scale,
        "causal": request.causal,
        "window_size": (-1, -1) if request.sliding_window is None else (request.sliding_window - 1, 0),
    }
    attend = _Attention(_key_padding(request), settings)
    padding, value_padding = ((0, max(0, extra) if pad else 0) for extra in (value_width - width, width - value_width))
    outputs = []
    for stream in (0, 1):
        k_stream, v_stream = request.stream_heads(stream)
        q_stream, k_stream = F.pad(request.q[:, stream::2], padding), F.pad(k_stream, padding)
        values = [F.pad(v_stream, value_padding)] if pad or width == value_width else v_stream.chunk(2, dim=-1)
        output = torch.cat([attend(q_stream, k_stream, part) for part in values], dim=-1)
        outputs.append(output[..., :value_width])
    return outputs[0] - request.lam * outputs[1]


def _key_padding(request: Request) -> Tensor | None:
    """The mask as ``[B, T]``, ``True`` for tokens; ``None`` without a mask."""
    if request.attn_mask is None:
        return None
    return request.attn_mask.reshape(-1, request.key_length).expand(request.q.shape[0], request.key_length)


class _Attention:
    """One call of the package in this project's tensor layout, which leaves out padding tokens if there are any."""

    def __init__(self, key_padding: Tensor | None, settings: dict[str, Any]) -> None:
        import flash_attn

        self._package: Any = flash_attn
        self._settings = settings
        self._tokens: Tensor | None = None
        if key_padding is not None:
            self._tokens = key_padding.flatten().nonzero().flatten()
            counts = key_padding.sum(dim=1, dtype=torch.int32)
            self._ends = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            self._longest = int(counts.max())

    def __call__(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
        q, k, v = (side.transpose(1, 2) for side in (q_BHSd, k_BHTd, v_BHTd))
        if self._tokens is None:
            output: Tensor = self._package.flash_attn_func(q, k, v, **self._settings)
            return output.transpose(1, 2)
        batch, length = q.shape[:2]
        packed_NHd = [side.flatten(0, 1).index_select(0, self._tokens) for side in (q, k, v)]
        if self._longest:
            ends, longest = self._ends, self._longest
            packed: Tensor = self._package.flash_attn_varlen_func(
                *packed_NHd, ends, ends, longest, longest, **self._settings
            )
        else:
            packed = packed_NHd[2].new_zeros(0, q.shape[2], v.shape[3])
        output = packed.new_zeros(batch * length, q.shape[2], v.shape[3]).index_copy(0, self._tokens, packed)
        return output.reshape(batch, length, q.shape[2], v.shape[3]).transpose(1, 2)
