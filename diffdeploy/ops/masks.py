"""Combination of causal, window and user masks into one mask, with fully masked queries marked separately.

Shape suffixes: B batch, H heads, S query length, T key length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdeploy.errors import InputError
from diffdeploy.ops.heads import as_rows
from diffdeploy.ops.target import may_run_on_cuda

__all__ = ["Visibility", "is_key_padding", "kernel_mask", "require_window_to_slide", "visibility"]


@dataclass(frozen=True)
class Visibility:
    """The combined mask for a kernel.

    Attributes:
        mask: boolean (``True`` keeps a key) or additive mask, broadcastable to ``[B, H, S, T]``; ``None`` if no mask is
            needed. None of its rows is fully masked, since kernels disagree on such rows.
        is_causal: true for the square causal mask, which kernels apply without a tensor.
        dead: fully masked rows, ``[..., S, 1]``, whose result is 0; ``None`` if there can be none.
        offset: query ``i`` attends only to keys up to ``i + offset``; ``None`` for no such limit.
        window: size of the window: a query attends to at most this many keys, ending at that limit; ``None`` for all.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    dead: Tensor | None = None
    offset: int | None = None
    window: int | None = None

    def of_stream(self, stream: int, num_heads: int) -> "Visibility":
        """Mask of stream 0 or 1; unchanged unless it has an entry for each of the ``2h`` half heads."""
        return self._heads(lambda mask: mask[:, stream::2] if mask.shape[1] == 2 * num_heads else mask)

    def of_half_heads(self, num_heads: int) -> "Visibility":
        """Mask for ``2h`` half heads in natural order; unchanged unless it has an entry for each head."""
        return self._heads(lambda mask: mask.repeat_interleave(2, dim=1) if mask.shape[1] == num_heads else mask)

    def reorder(self, order: Tensor) -> "Visibility":
        """Reorder the heads of the mask, if it has an entry for each head."""
        return self._heads(lambda mask: mask.index_select(1, order) if mask.shape[1] > 1 else mask)

    @staticmethod
    def stack(parts: Sequence["Visibility"]) -> "Visibility":
        """Concatenate masks along the head axis, in the order in which their heads are concatenated."""
        first = parts[0]
        if first.mask is None or first.mask.ndim < 4 or first.mask.shape[1] == 1:
            return first
        masks, dead = [part.mask for part in parts if part.mask is not None], [part.dead for part in parts]
        together = [rows for rows in dead if rows is not None]
        return Visibility(torch.cat(masks, dim=1), dead=torch.cat(together, dim=1) if together else None)

    def _heads(self, change: Callable[[Tensor], Tensor]) -> "Visibility":
        if self.mask is None or self.mask.ndim < 4 or self.mask.shape[1] == 1:
            return self
        dead = self.dead
        return Visibility(change(self.mask), self.is_causal, None if dead is None else change(dead))

    def of_rows(self, q_BHSd: Tensor, num_kv_heads: int) -> "Visibility":
        """Mask ``[B, H, S * rows, T]`` for query heads that are reshaped into rows of the key/value heads they read.

        Rows of one query are adjacent. ``H`` is 1, or ``num_kv_heads`` if the mask has an entry for each head. If
        there are more rows than queries, the square causal mask must become a tensor.
        """
        num_rows, seen = q_BHSd.shape[1] // num_kv_heads, self
        if num_rows == 1:
            return self
        if self.is_causal:
            newest = torch.arange(q_BHSd.shape[2], device=q_BHSd.device)
            seen = Visibility(newest <= newest[:, None])

        def rows_of(side: Tensor) -> Tensor:
            if side.ndim == 4 and side.shape[1] > 1:
                return as_rows(side, num_kv_heads)
            return side.reshape(*(1,) * (4 - side.ndim), *side.shape).repeat_interleave(num_rows, dim=2)

        mask, dead = (None if side is None else rows_of(side) for side in (seen.mask, seen.dead))
        return Visibility(mask, dead=dead)

    def keys_of(self, queries: slice, key_length: int) -> slice:
        """Keys within the position limits of at least one of these queries."""
        if self.offset is None:
            return slice(0, key_length)
        end = max(0, min(key_length, queries.stop + self.offset))
        return slice(0 if self.window is None else max(0, min(end, queries.start + self.offset + 1 - self.window)), end)

    def part(self, heads: slice, queries: slice, keys: slice) -> "Visibility":
        """Mask for some heads of one stream and some queries; ``keys`` includes all keys that these queries can see."""
        some = self._heads(lambda mask: mask[:, heads])
        return Visibility(
            None if some.mask is None else some.mask[..., queries, keys],
            some.is_causal,
            None if some.dead is None else some.dead[..., queries, :],
        )

    def clear_dead(self, output: Tensor) -> Tensor:
        """Set the result of fully masked queries to 0."""
        return output if self.dead is None else output.masked_fill(self.dead, 0.0)


def visibility(
    q_BHSd: Tensor, k_BHTd: Tensor, *, causal: bool, attn_mask: Tensor | None, sliding_window: int | None
) -> Visibility:
    """Combine everything that hides keys from queries.

    Args:
        q_BHSd: queries of ``2h`` half heads.
        k_BHTd: keys.
        causal: true if query ``i`` of ``S`` attends only to keys up to ``T - S + i``.
        attn_mask: boolean (``True`` keeps a key) or additive mask, broadcastable to ``[B, 1 or h or 2h, S, T]``.
        sliding_window: size of the window: a query attends to at most this many of the most recent keys.

    Raises:
        InputError: the mask does not fit or is neither boolean nor floating point, or a window is given without
            ``causal``.
    """
    length, key_length = q_BHSd.shape[2], k_BHTd.shape[2]
    offset = key_length - length if causal else None
    require_window_to_slide(sliding_window, causal=causal)
    if attn_mask is not None:
        # Some runtimes broadcast the batch and head axes of a mask, but not its query and key axes.
        attn_mask = _checked(attn_mask, q_BHSd, key_length).expand(-1, -1, length, key_length)
    band = None
    # Lengths are compared last, and only if nothing else decides, since a comparison becomes a guard in a trace.
    if causal and (sliding_window is not None or attn_mask is not None or bool(length != key_length)):
        newest = torch.arange(length, device=q_BHSd.device)[:, None] + (key_length - length)
        keys = torch.arange(key_length, device=q_BHSd.device)
        band = keys <= newest
        if sliding_window is not None:
            band = band & (keys > newest - sliding_window)
    if attn_mask is None:
        if band is None:
            return Visibility(is_causal=causal, offset=offset)
        # With at least as many keys as queries, no row is empty; otherwise the first queries precede every key.
        mask, dead = _without_dead_rows(band, None) if length > key_length else (band, None)
    elif attn_mask.dtype == torch.bool:
        mask, dead = _without_dead_rows(attn_mask if band is None else attn_mask & band, None)
    else:
        seen = attn_mask != float("-inf")
        mask, dead = _without_dead_rows(seen if band is None else seen & band, attn_mask)
    return Visibility(mask, dead=dead, offset=offset, window=sliding_window)


def require_window_to_slide(sliding_window: int | None, *, causal: bool) -> None:
    """Reject a sliding window without causality.

    Raises:
        InputError: a window is given without ``causal``.
    """
    if sliding_window is not None and not causal:
        raise InputError("a sliding window requires causal attention: without causality, its last key is undefined")


def is_key_padding(mask: Tensor, batch: int, key_length: int) -> bool:
    """True if a mask is boolean and has the shape ``[B or 1, 1, 1, T]``, which hides the same keys from all queries.

    Leading axes of size 1 may be missing.
    """
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    # Sizes are compared one by one: for symbolic sizes, comparing tuples would look for identical symbols.
    same_batch = shape[0] == 1 or shape[0] == batch
    one_for_all = len(shape) == 4 and shape[1] == 1 and shape[2] == 1 and shape[3] == key_length
    return mask.dtype == torch.bool and same_batch and one_for_all


def kernel_mask(q_BHSd: Tensor, mask: Tensor | None) -> Tensor | None:
    """Mask in the form that fused kernels take: additive in half precision if it may run on CUDA, else unchanged.

    Before it calls cuDNN, torch replaces hidden entries of a boolean mask with a finite number, so that hidden keys
    with scores above about 3e5 become visible: 30 to 50 % of the queries were wrong on an H100 with torch 2.11.
    """
    if mask is None or mask.dtype != torch.bool or q_BHSd.dtype not in (torch.float16, torch.bfloat16):
        return mask
    if not may_run_on_cuda(q_BHSd):
        return mask
    return torch.zeros((), dtype=q_BHSd.dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _without_dead_rows(seen: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dead = ~seen.any(dim=-1, keepdim=True)
    seen = seen | dead
    if bias is None:
        return seen, dead
    finite = bias.masked_fill(bias == float("-inf"), 0.0)
    return finite.masked_fill(~seen, float("-inf")), dead


def _checked(attn_mask: Tensor, q_BHSd: Tensor, key_length: int) -> Tensor:
    batch, half_heads, length, _ = q_BHSd.shape
    if attn_mask.dtype != torch.bool:
        if not attn_mask.is_floating_point():
            raise InputError(f"attn_mask has dtype {attn_mask.dtype}; accepted: boolean (True is kept) or additive")
        attn_mask = attn_mask.to(q_BHSd.dtype)
    shape = list(attn_mask.shape)
    if attn_mask.ndim > 4:
        raise InputError(f"attn_mask has shape {shape}; accepted: at most 4 axes, [B, heads, S, T]")
    attn_mask = attn_mask.reshape(*(1,) * (4 - attn_mask.ndim), *shape)
    wanted = ((1, batch), (1, half_heads // 2, half_heads), (1, length), (1, key_length))
    # `in` cannot be used: for symbolic sizes, torch.compile would look for the same symbol, not for an equal one.
    if not all(any(size == each for each in sizes) for size, sizes in zip(attn_mask.shape, wanted, strict=True)):
        raise InputError(
            f"attn_mask has shape {shape}; accepted: shapes that broadcast to "
            f"[{batch}, 1 or {half_heads // 2} or {half_heads}, {length}, {key_length}]"
        )
    return attn_mask
