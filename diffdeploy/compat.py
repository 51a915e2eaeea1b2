"""Drop-in replacements for the public modules, with the same constructor arguments, state-dict keys and results.

Arguments and keys follow microsoft/unilm, Diff-Transformer (V1: three modules, V2: one), and
vasqu/multihead-sdpadiff (four variants). Unlike the originals, the replacements share one core, accept masks and single
tokens, and run on CPUs without Triton.
"""

from typing import Any

from torch import Tensor

from diffdeploy.config import (
    DiffAttentionConfig,
    DiffAttentionV2Config,
    GqaLayout,
    RopeStyle,
    lambda_init_at,
)
from diffdeploy.errors import InputError
from diffdeploy.modules.attention import DiffAttention, DiffAttentionV2, Rotation
from diffdeploy.modules.rotary import rotate
from diffdeploy.ops import Impl

__all__ = [
    "MultiheadDiffAttn",
    "MultiheadFlashDiff1",
    "MultiheadFlashDiff2",
    "MultiheadFlashDiffV2",
    "MultiheadSdpaDiff1",
    "MultiheadSdpaDiff2",
    "MultiheadSdpaDiff3",
    "MultiheadSdpaDiff4",
]

RelativePositions = tuple[Tensor, Tensor]
# The rotary kernel of all the originals rotates neighbouring channels.
_STYLE: RopeStyle = "interleaved"


def _config(
    embed_dim: int, depth: int, num_heads: int, num_kv_heads: int | None, gqa_layout: GqaLayout
) -> DiffAttentionConfig:
    if num_heads < 1 or embed_dim % (2 * num_heads):
        raise InputError(f"embed_dim is {embed_dim}; accepted: a multiple of twice the {num_heads} differential heads")
    lambda_init = lambda_init_at(depth)
    return DiffAttentionConfig(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=embed_dim // num_heads // 2,
        lambda_init=lambda_init,
        output_scale=1 - lambda_init,
        gqa_layout=gqa_layout,
    )


def _rotation(rel_pos: RelativePositions | None) -> Rotation:
    """Rotary embedding from the caller's tables of cosines and sines, each ``[S, d/2]``."""
    if rel_pos is None:
        return lambda x_BHSd: x_BHSd
    cos, sin = rel_pos
    return lambda x_BHSd: rotate(x_BHSd, cos[: x_BHSd.shape[2]], sin[: x_BHSd.shape[2]], _STYLE)


class _Multihead(DiffAttention):
    """A V1 module that takes its rotary tables from the caller."""

    _impl: Impl
    _gqa_layout: GqaLayout
    # In the modules that accept a mask, it replaces the causal mask.
    _mask_replaces_causality = True

    def __init__(self, embed_dim: int, depth: int, num_heads: int, num_kv_heads: int | None = None) -> None:
        super().__init__(_config(embed_dim, depth, num_heads, num_kv_heads, self._gqa_layout), impl=self._impl)

    def forward(  # type: ignore[override]  # the originals' signature
        self, x: Tensor, rel_pos: RelativePositions | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Compute attention, which is causal unless a mask is given.

        Args:
            x: input, ``[B, S, D]``.
            rel_pos: cosines and sines ``[S, d/2]``, applied to interleaved pairs.
            attn_mask: boolean (``True`` keeps a key) or additive mask, broadcastable to ``[B, 1 or h or 2h, S, S]``.

        Returns:
            Output, ``[B, S, D]``.

        Raises:
            InputError: the mask does not fit.
        """
        causal = not (self._mask_replaces_causality and attn_mask is not None)
        mask = attn_mask if attn_mask is None or attn_mask.ndim != 2 else attn_mask[None, None]
        output, _ = self.compute(x, mask, _rotation(rel_pos), causal=causal)
        return output


class _MultiheadSdpaDiff(_Multihead):
    """A V1 module that takes the head counts of the softmax model of equal size, and halves them."""

    # All four variants repeat the key heads before they split the streams.
    _gqa_layout: GqaLayout = "legacy"

    def __init__(self, embed_dim: int, depth: int, num_heads: int, num_kv_heads: int | None = None) -> None:
        for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if count is not None and (count < 1 or count % 2):
                raise InputError(f"{name} is {count}; accepted: an even number, since pairs of heads are subtracted")
        super().__init__(embed_dim, depth, num_heads // 2, None if num_kv_heads is None else num_kv_heads // 2)


class MultiheadSdpaDiff1(_MultiheadSdpaDiff):
    """Variant 1 of multihead-sdpadiff, which makes four attention calls."""

    _impl = Impl.FOUR_CALL


class MultiheadSdpaDiff2(_MultiheadSdpaDiff):
    """Variant 2 of multihead-sdpadiff, which makes two attention calls with wide values."""

    _impl = Impl.TWO_CALL


class MultiheadSdpaDiff3(_MultiheadSdpaDiff):
    """Variant 3 of multihead-sdpadiff, which makes one attention call with ``4h`` heads."""

    _impl = Impl.STACKED_SPLIT


class MultiheadSdpaDiff4(_MultiheadSdpaDiff):
    """Variant 4 of multihead-sdpadiff, which makes one attention call with ``2h`` heads and wide values."""

    _impl = Impl.STACKED_WIDE


class MultiheadDiffAttn(_Multihead):
    """Microsoft's naive module."""

    _impl = Impl.NAIVE
    # It repeats the key heads first, so with the same weights it pairs keys differently from Microsoft's flash modules.
    _gqa_layout: GqaLayout = "legacy"


class MultiheadFlashDiff1(_Multihead):
    """Microsoft's module for a FlashAttention with unequal widths; it runs the device's fastest implementation here."""

    _impl = Impl.AUTO
    _gqa_layout: GqaLayout = "canonical"
    _mask_replaces_causality = False


class MultiheadFlashDiff2(MultiheadFlashDiff1):
    """Microsoft's module for stock FlashAttention; it computes the same function as `MultiheadFlashDiff1`."""


class MultiheadFlashDiffV2(DiffAttentionV2):
    """Microsoft's second version. Its output projection is called ``o_proj``."""

    def __init__(
        self, use_diff_v2: bool, d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int
    ) -> None:
        if not use_diff_v2:
            raise InputError("use_diff_v2 is False; that is plain attention, which this class does not implement")
        super().__init__(
            DiffAttentionV2Config(
                embed_dim=d_model,
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_dim=head_dim,
            )
        )
        self.register_state_dict_post_hook(_name_as_original)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_name_as_here)  # type: ignore[no-untyped-call]

    def forward(  # type: ignore[override]  # the original's signature
        self, x: Tensor, rel_pos: RelativePositions | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Compute causal attention; as in `MultiheadFlashDiff1`, a mask is combined with the causal mask.

        Raises:
            InputError: the mask does not fit.
        """
        mask = attn_mask if attn_mask is None or attn_mask.ndim != 2 else attn_mask[None, None]
        output, _ = self.compute(x, mask, _rotation(rel_pos))
        return output


def _rename(state: dict[str, Any], prefix: str, old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{old}.")]:
        state[f"{prefix}{new}.{key.removeprefix(f'{prefix}{old}.')}"] = state.pop(key)


def _name_as_original(_module: Any, state: dict[str, Any], prefix: str, _local_metadata: Any) -> None:
    _rename(state, prefix, "out_proj", "o_proj")


def _name_as_here(_module: Any, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    _rename(state, prefix, "o_proj", "out_proj")
