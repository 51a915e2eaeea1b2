"""One call of the operator; an implementation checks that it supports the call, and then computes it.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import Visibility, visibility

__all__ = ["HeadNorm", "Keys", "Phase", "Request"]


class Keys(StrEnum):
    """Arrangement of the keys of a key/value head."""

    STREAMS = "streams"
    PAIRED = "paired"
    SHARED = "shared"


class Phase(StrEnum):
    """Kind of a call, determined by its sizes."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class HeadNorm:
    """The norm after the difference (arXiv 2410.05258, section 2.1), which some implementations compute themselves.

    Attributes:
        eps: added to the mean square of the ``e`` channels of a head.
        weight: gamma ``[e]``, or ``None`` for ones.
        factor: factor after the norm, ``1 - lambda_init`` in the paper.
    """

    eps: float
    weight: Tensor | None = None
    factor: float = 1.0

    def __call__(self, heads_BHSe: Tensor) -> Tensor:
        """Normalise the channels of each head in fp32, round the result, and multiply it by the factor."""
        return F.rms_norm(heads_BHSe, heads_BHSe.shape[-1:], self.weight, self.eps) * self.factor


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `diff_attention`, with shapes that fit.

    Attributes:
        q: queries ``[B, 2h, S, d]``, with stream ``s`` of head ``i`` at ``2i + s``.
        k: keys, arranged as `keys` says.
        v: values ``[B, h_kv, T, e]``.
        lam: lambda, a scalar or ``[B or 1, h, S, 1]``, in the dtype of the queries.
        causal: true for a causal mask, aligned bottom-right.
        attn_mask: boolean or additive mask that has not been checked yet, or ``None``.
        sliding_window: number of keys that a query attends to; ``None`` for all.
        gqa_layout: map from query streams to key streams.
        scale: factor of the scores.
        keys: ``streams`` ``[B, 2 h_kv, T, d]``, ``paired`` ``[B, h_kv, T, 2d]`` or ``shared`` ``[B, h_kv, T, d]``.
        traced: true if a graph is being traced, in which sizes are symbols and comparing one would add a guard.
        norm: norm of the heads, for implementations that compute it, see `Implementation.normalises`.
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
    norm: HeadNorm | None = None

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
        norm: HeadNorm | None = None,
    ) -> "Request":
        """Create a request and check its shapes; see `diff_attention` for the arguments.

        Raises:
            InputError: the shapes of queries, keys and values do not match.
        """
        return Request(
            q=q_BHSd,
            k=k_BHTd,
            v=v_BHTe,
            # A cast that changes nothing would be two nodes in a trace.
            lam=lam if lam.dtype == q_BHSd.dtype else lam.to(q_BHSd.dtype),
            causal=causal,
            attn_mask=attn_mask,
            sliding_window=sliding_window,
            gqa_layout=gqa_layout,
            scale=float(q_BHSd.shape[-1] ** -0.5) if scale is None else scale,
            keys=_checked_keys(q_BHSd, k_BHTd, v_BHTe),
            traced=torch.compiler.is_compiling(),
            norm=norm,
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
        """Number of differential heads ``h``."""
        return self.q.shape[1] // 2

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads ``h_kv``."""
        return self.v.shape[1]

    @property
    def group_size(self) -> int:
        """Number ``g`` of heads that read one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def length(self) -> int:
        """Number of queries ``S``; a symbol if the request is `traced`."""
        return self.q.shape[2]

    @property
    def key_length(self) -> int:
        """Number of keys ``T``; a symbol if the request is `traced`."""
        return self.k.shape[2]

    @property
    def device(self) -> str:
        """Device type of the tensors; a graph may be traced for another device."""
        return self.q.device.type

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of queries, keys, values and the result."""
        return self.q.dtype

    @property
    def phase(self) -> Phase | None:
        """``decode`` for one query; ``None`` in a traced graph, which serves all sizes."""
        if self.traced:
            return None
        return Phase.DECODE if self.length == 1 else Phase.PREFILL

    @property
    def permutes_key_streams(self) -> bool:
        """True if streams read keys other than those in the canonical key map."""
        return self.gqa_layout == "legacy" and self.group_size > 1 and self.keys != Keys.SHARED

    def stream_heads(self, stream: int, v_BHTe: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of one stream, see `diffdeploy.ops.heads.stream_heads`.

        Args:
            stream: 0 or 1.
            v_BHTe: a part of the values; all values by default.
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
        """Combine everything that hides keys from queries into one mask.

        Raises:
            InputError: the mask does not fit, or a window is given without ``causal``.
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
            "accepted: [B, 2h, S, d], [B, 2 h_kv or h_kv, T, d] or [B, h_kv, T, 2d], and [B, h_kv, T, e] with h_kv "
            "a divisor of h"
        )
    return keys
