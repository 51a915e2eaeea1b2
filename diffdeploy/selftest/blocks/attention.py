"""Blocks whose attentions read the wrong heads, or compute with too little precision.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.graphs import Stage
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import Visibility
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps, to_half_precision
from diffdeploy.selftest.conditions import float32, grouped, several_kv_heads, version_1


@faulty("streams_exchanged", "the signal is subtracted instead of the noise", Stage.SIGNAL, version_1)
class StreamsExchanged(Steps):
    """The signal is subtracted instead of the noise."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().heads_of(1 - stream, q_BHSd, k_BHTd, v_BHTe)


@faulty("query_streams_exchanged", "signal queries meet noise keys, and the other way round", Stage.SIGNAL)
class QueryStreamsExchanged(Steps):
    """Signal queries meet noise keys, and the other way round."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q_BHSd[:, 1 - stream :: 2], k, v


@faulty("one_key_stream", "both streams read the keys of the signal", Stage.NOISE, version_1)
class OneKeyStream(Steps):
    """Both streams read the keys of the signal."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, _, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q, super().heads_of(0, q_BHSd, k_BHTd, v_BHTe)[1], v


@faulty("one_query_stream", "both streams read the queries of the signal", Stage.NOISE)
class OneQueryStream(Steps):
    """Both streams read the queries of the signal."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q_BHSd[:, ::2], k, v


@faulty("modulo_heads", "head ``i`` reads key/value head ``i % h_kv``", Stage.SIGNAL, grouped, several_kv_heads)
class ModuloHeads(Steps):
    """Head ``i`` reads key/value head ``i % h_kv``."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.config.group_size
        k, v = stream_heads(
            k_BHTd,
            v_BHTe,
            stream,
            width=self.config.head_dim,
            num_heads=self.config.num_heads,
            gqa_layout="canonical",
        )
        return q_BHSd[:, stream::2], k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)


@faulty(
    "modulo_values",
    "the keys are correct, but the values are chosen by ``i % h_kv``",
    Stage.SIGNAL,
    grouped,
    several_kv_heads,
)
class ModuloValues(Steps):
    """The keys are correct, but the values are chosen by ``i % h_kv``."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _ = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        groups = self.config.group_size
        return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), v_BHTe.repeat(1, groups, 1, 1)


@faulty("first_key_head", "every head reads the first key/value head", Stage.SIGNAL, several_kv_heads)
class FirstKeyHead(Steps):
    """Every head reads the first key/value head."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)


@faulty("value_halves_exchanged", "the halves of the values are swapped, in the attentions only", Stage.SIGNAL)
class ValueHalvesExchanged(Steps):
    """The halves of the values are swapped, in the attentions only."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return q, k, v.roll(v.shape[-1] // 2, dims=-1)


@faulty("noise_reads_one_half", "the noise reads the first half of the values twice", Stage.NOISE)
class NoiseReadsOneHalf(Steps):
    """The noise reads the first half of the values twice."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        half = v[..., : v.shape[-1] // 2]
        return q, k, torch.cat((half, half), dim=-1) if stream == 1 else v


@faulty(
    "scaled_by_value_width",
    "scores divided by the square root of the value width, as a kernel for equal widths would",
    Stage.SIGNAL,
)
class ScaledByValueWidth(Steps):
    """Scores are divided by the square root of the value width, as in a kernel for equal widths."""

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        return super().softmax_attention(q_BHSd * 2**-0.5, k_BHTd, v_BHTe, seen)


@faulty("half_precision_attention", "both attentions in float16", Stage.SIGNAL, float32)
class HalfPrecisionAttention(Steps):
    """Both attentions are computed in float16."""

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        q, k, v = (side.to(torch.float16) for side in (q_BHSd, k_BHTd, v_BHTe))
        return super().softmax_attention(q, k, v, seen).to(q_BHSd.dtype)


@faulty("half_precision_noise", "the noise attention in float16", Stage.NOISE, float32)
class HalfPrecisionNoise(Steps):
    """The noise attention is computed in float16."""

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(stream, q_BHSd, k_BHTd, v_BHTe)
        return (q, k, v) if stream == 0 else (to_half_precision(q), to_half_precision(k), to_half_precision(v))

    def streams(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
        signal, noise = super().streams(q_BHSd, k_BHTd, v_BHTe, seen)
        return signal, to_half_precision(noise)
