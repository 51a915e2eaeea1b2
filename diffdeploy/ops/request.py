"""What one call of the operator asks for: implementations are asked with it whether they can, and run on it.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import Visibility, visibility

__all__ = ["Keys", "Phase", "Request"]


class Keys(StrEnum):
    """How the keys of a key/value head are held."""

    STREAMS = "streams"
    PAIRED = "paired"
    SHARED = "shared"


class Phase(StrEnum):
    """What the sizes make of a call."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `diff_attention`, whose shapes fit.

    Attributes:
        q: queries ``[B, 2h, S, d]``, head ``i`` stream ``s`` at ``2i + s``.
        k: keys, as `keys` says.
        v: values ``[B, h_kv, T, e]``.
        lam: scalar, or ``[B or 1, h, S, 1]``, in the dtype of the queries.
        causal: bottom-right.
        attn_mask: boolean or additive, or ``None``; not checked yet.
        sliding_window: keys that a query sees, or ``None``.
        gqa_layout: which key stream a query stream reads.
        scale: factor of the scores.
        keys: ``streams`` ``[B, 2 h_kv, T, d]``, ``paired`` ``[B, h_kv, T, 2d]`` or ``shared`` ``[B, h_kv, T, d]``.
        traced: whether a graph is made, in which sizes are symbols: a rule that compared one would become a guard.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lam: Tensor
    causal: bool
    attn_mask: Tensor | None
    sliding_window: int | None
    gqa_layout: GqaLayout
    scale: float
    keys: Keys
    traced: bool

    @staticmethod
    def of(
        q_BHSd: Tensor,
        k_BHTd: Tensor,
        v_BHTe: Tensor,
        lam: Tensor,
        *,
        causal: bool,
        attn_mask: Tensor | None = None,
        sliding_window: int | None = None,
        gqa_layout: GqaLayout = "canonical",
        scale: float | None = None,
    ) -> "Request":
        """Check the shapes; see `diff_attention` for the arguments.

        Raises:
            InputError: queries, keys and values do not fit each other.
        """
        return Request(
            q=q_BHSd,
            k=k_BHTd,
            v=v_BHTe,
            lam=lam.to(q_BHSd.dtype),
            causal=causal,
            attn_mask=attn_mask,
            sliding_window=sliding_window,
            gqa_layout=gqa_layout,
            scale=float(q_BHSd.shape[-1] ** -0.5) if scale is None else scale,
            keys=_checked_keys(q_BHSd, k_BHTd, v_BHTe),
            traced=torch.compiler.is_compiling(),
        )

    @property
    def width(self) -> int:
        """Stream width ``d``."""
        return self.q.shape[-1]

    @property
    def value_width(self) -> int:
        """Value width ``e``."""
        return self.v.shape[-1]

    @property
    def num_heads(self) -> int:
        """Differential heads ``h``."""
        return self.q.shape[1] // 2

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads ``h_kv``."""
        return self.v.shape[1]

    @property
    def group_size(self) -> int:
        """Heads that read one key/value head, ``g``."""
        return self.num_heads // self.num_kv_heads

    @property
    def length(self) -> int:
        """Queries ``S``; a symbol where it is `traced`."""
        return self.q.shape[2]

    @property
    def key_length(self) -> int:
        """Keys ``T``; a symbol where it is `traced`."""
        return self.k.shape[2]

    @property
    def device(self) -> str:
        """Kind of device of the tensors; a graph may be traced for another one."""
        return self.q.device.type

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys, values and the result."""
        return self.q.dtype

    @property
    def phase(self) -> Phase | None:
        """``decode`` for one query; ``None`` in a graph, which serves all sizes."""
        if self.traced:
            return None
        return Phase.DECODE if self.length == 1 else Phase.PREFILL

    @property
    def permutes_key_streams(self) -> bool:
        """Whether streams read other keys than those of the canonical key map."""
        return self.gqa_layout == "legacy" and self.group_size > 1 and self.keys != Keys.SHARED

    def stream_heads(self, stream: int, v_BHTe: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of one stream, see `diffdeploy.ops.heads.stream_heads`.

        Args:
            stream: 0 or 1.
            v_BHTe: a part of the values, in place of all.
        """
        return stream_heads(
            self.k,
            self.v if v_BHTe is None else v_BHTe,
            stream,
            width=self.width,
            num_heads=self.num_heads,
            gqa_layout=self.gqa_layout,
        )

    def visibility(self) -> Visibility:
        """Everything that hides keys from queries, as one mask.

        Raises:
            InputError: a mask that does not fit, or a window without ``causal``.
        """
        return visibility(
            self.q,
            self.k,
            causal=self.causal,
            attn_mask=self.attn_mask,
            sliding_window=self.sliding_window,
        )


def _checked_keys(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> Keys:
    if any(side.ndim != 4 for side in (q_BHSd, k_BHTd, v_BHTe)):
        raise InputError("queries, keys and values must have four axes: batch, heads, positions, channels")
    half_heads, key_heads, kv_heads = (side.shape[1] for side in (q_BHSd, k_BHTd, v_BHTe))
    width = q_BHSd.shape[-1]
    forms = {
        (2 * kv_heads, width): Keys.STREAMS,
        (kv_heads, 2 * width): Keys.PAIRED,
        (kv_heads, width): Keys.SHARED,
    }
    keys = forms.get((key_heads, k_BHTd.shape[-1]))
    fits = (
        keys is not None
        and half_heads % 2 == 0
        and (half_heads // 2) % kv_heads == 0
        and k_BHTd.shape[2] == v_BHTe.shape[2]
        and q_BHSd.shape[0] == k_BHTd.shape[0] == v_BHTe.shape[0]
    )
    if not fits or keys is None:
        raise InputError(
            f"queries {list(q_BHSd.shape)}, keys {list(k_BHTd.shape)} and values {list(v_BHTe.shape)} do not fit; "
            "accepted are [B, 2h, S, d], [B, 2 h_kv or h_kv, T, d] or [B, h_kv, T, 2d], and [B, h_kv, T, e] with h_kv "
            "a divisor of h"
        )
    return keys
