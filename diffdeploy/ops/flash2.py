"""FlashAttention-2 through the ``flash-attn`` package, eagerly on CUDA.

It wants equal widths of queries, keys and values, so the values (width ``2d``) are met in one of two ways: queries and
keys zero-padded to ``2d``, two calls; or the values split in halves, four calls.

Shape suffixes: B batch, H heads, S query length, T key length, N tokens without padding, d stream width, e value width.
Its own layout has heads behind positions: ``[B, S, H, d]``.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.ops.heads import stream_heads

__all__ = ["flash2", "num_calls", "pads", "require_flash2"]

_MAX_WIDTH = 256
_WIDEST_FAST = 128


def require_flash2(q_BHSd: Tensor, v_BHTe: Tensor) -> None:
    """Check all that FlashAttention-2 demands.

    Raises:
        UnavailableError: tensors that are not on CUDA, or no ``flash-attn``.
        InputError: a dtype or a width that it has no kernel for.
    """
    if q_BHSd.device.type != "cuda":
        raise UnavailableError(f"flash2 runs on CUDA only, and the tensors are on {q_BHSd.device.type}")
    if find_spec("flash_attn") is None:
        raise UnavailableError("flash2 needs the package flash-attn, which is not installed")
    if q_BHSd.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"flash2 runs in float16 and bfloat16, and the tensors are {q_BHSd.dtype}")
    width = max(q_BHSd.shape[-1], v_BHTe.shape[-1] // 2)
    if width > _MAX_WIDTH or q_BHSd.shape[-1] % 8:
        raise InputError(
            f"flash2 has kernels for head widths that are multiples of 8 up to {_MAX_WIDTH}, and this one is {width}"
        )


def pads(width: int, value_width: int) -> bool:
    """Whether zero-padding (two calls of width ``2d``) is chosen over splitting the values (four calls of width ``d``).

    Both take 16 d multiplications and additions per query and key, but padding computes each exponential once and not
    twice. Above 128 the kernels of the package have smaller tiles, which costs more than that.
    """
    return width < value_width <= _WIDEST_FAST


def num_calls(width: int, value_width: int) -> int:
    """How many attentions `flash2` runs: one per stream, or two where the values are split."""
    return 2 if width == value_width or pads(width, value_width) else 4


def flash2(
    q_BHSd: Tensor,
    k_BHTd: Tensor,
    v_BHTe: Tensor,
    lam: Tensor,
    *,
    causal: bool,
    key_padding: Tensor | None,
    sliding_window: int | None,
    gqa_layout: GqaLayout,
    pad: bool | None = None,
) -> Tensor:
    """Differential attention from calls of ``flash_attn_func``, or ``flash_attn_varlen_func`` when there is padding.

    Args:
        q_BHSd: see `diff_attention`, as `k_BHTd`, `v_BHTe`, `lam`, `causal`, `sliding_window` and `gqa_layout`.
        k_BHTd: keys.
        v_BHTe: values.
        lam: scalar or ``[B, h, S, 1]``.
        causal: bottom-right.
        key_padding: boolean ``[B, T]``, ``True`` is a token; needs ``S == T``. The rows of padding tokens give 0.
        sliding_window: keys that a query sees.
        gqa_layout: see `DiffAttentionConfig`.
        pad: which way to equal widths; by default `pads` decides.

    Raises:
        InputError: padding with ``S != T``.
    """
    width, value_width, num_heads = q_BHSd.shape[-1], v_BHTe.shape[-1], q_BHSd.shape[1] // 2
    if pad is None:
        pad = pads(width, value_width)
    if pad:
        q_BHSd, k_BHTd = (F.pad(side, (0, value_width - width)) for side in (q_BHSd, k_BHTd))
    settings = {
        "softmax_scale": width**-0.5,
        "causal": causal,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
    }
    attend = _Attention(key_padding, q_BHSd.shape[2], k_BHTd.shape[2], settings)
    outputs = []
    for stream in (0, 1):
        k_stream, v_stream = stream_heads(k_BHTd, v_BHTe, stream, num_heads, gqa_layout)
        values = [v_stream] if pad or width == value_width else v_stream.chunk(2, dim=-1)
        outputs.append(torch.cat([attend(q_BHSd[:, stream::2], k_stream, part) for part in values], dim=-1))
    return outputs[0] - lam * outputs[1]


class _Attention:
    """One call of the package, in this project's layout; without the padding tokens, where there are some."""

    def __init__(self, key_padding: Tensor | None, length: int, key_length: int, settings: dict[str, Any]) -> None:
        import flash_attn

        self._package: Any = flash_attn
        self._settings = settings
        self._tokens: Tensor | None = None
        if key_padding is not None:
            if length != key_length:
                raise InputError(
                    f"flash2 takes padding only when queries and keys are the same tokens, and there are {length} "
                    f"queries and {key_length} keys"
                )
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
