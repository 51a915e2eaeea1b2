"""A block in onnxruntime's own operators: one ``GroupQueryAttention`` per stream, which includes the rotary embedding.

Shape suffixes: B batch, S sequence length, H heads, D model width, d stream width, e value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdeploy.config import AnyConfig
from diffdeploy.formats.onnx.names import ORT_ATTENTION, ORT_DOMAIN
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AttentionBlock
from diffdeploy.modules.rotary import rotate
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import visibility

__all__ = ["OrtGraphModule"]

_OPERATOR = f"{ORT_DOMAIN}::{ORT_ATTENTION}"


class OrtGraphModule(nn.Module):
    """A block with the signature of a graph, for export to ONNX only: torch cannot run it.

    Queries and keys are zero-padded to the width of the values, which is exact, since the operator needs equal widths.
    The rows of a projection are separated by stream, so that no stream has to be sliced out of its result.

    Args:
        block: frozen and causal block.
        spec: interface of the graph, ``plain`` or ``masked``.
    """

    def __init__(self, block: AttentionBlock, spec: GraphSpec) -> None:
        super().__init__()
        self.block, self.spec = block, spec
        config = block.config
        # The operator always embeds positions 0 .. S-1, and needs tables whose widths are multiples of 8.
        self.turns_inside = (
            config.rope is not None
            and config.rope.width(config.head_dim) == config.head_dim
            and "position_ids" not in spec.inputs
            and config.head_dim % 16 == 0
        )
        self.queries = _by_stream(block.q_proj, config.head_dim)
        shared = config.num_key_streams == config.num_kv_heads
        self.keys = None if shared or config.permutes_key_streams else _by_stream(block.k_proj, config.head_dim)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of the graph from its inputs, both in the order of the spec."""
        inputs = dict(zip(self.spec.inputs, tensors, strict=True))
        x_BSD = inputs["hidden_states"]
        block, config = self.block, self.block.config
        v_BSHe = _heads(block.v_proj(x_BSD), config.value_dim)
        seen_bias, dead = _bias(x_BSD, inputs.get("attention_mask"), config)
        # Projected once for both streams, since a weight that two MatMul nodes read is transposed at run time.
        all_keys = None if self.keys is not None else block.normalise_keys(_heads(block.k_proj(x_BSD), config.head_dim))
        streams = []
        for stream in (0, 1):
            q_BSHd = block.normalise_queries(_heads(self.queries[stream](x_BSD), config.head_dim))
            k_BSHd, values = self._keys_and_values(x_BSD, all_keys, v_BSHe, stream)
            q_BSHd, k_BSHd = (self._rotate(side, inputs.get("position_ids")) for side in (q_BSHd, k_BSHd))
            k_BSHd = _without_padding(k_BSHd, inputs.get("attention_mask"))
            output = self._attend(q_BSHd, k_BSHd, values, seen_bias)
            streams.append(output if dead is None else output.masked_fill(dead, 0.0))
        lam = block.lambda_(x_BSD).to(x_BSD.dtype)
        lam = lam if lam.ndim == 0 else lam.transpose(1, 2)
        return (block.project(block.normalise(streams[0] - lam * streams[1]).flatten(2)),)

    def _keys_and_values(
        self, x_BSD: Tensor, all_keys: Tensor | None, v_BSHe: Tensor, stream: int
    ) -> tuple[Tensor, Tensor]:
        block, config = self.block, self.block.config
        if all_keys is None:
            assert self.keys is not None
            return block.normalise_keys(_heads(self.keys[stream](x_BSD), config.head_dim)), v_BSHe
        if not config.permutes_key_streams:
            return all_keys, v_BSHe
        k_BHSd, v_BHSe = stream_heads(
            all_keys.transpose(1, 2),
            v_BSHe.transpose(1, 2),
            stream,
            width=config.head_dim,
            num_heads=config.num_heads,
            gqa_layout="legacy",
        )
        return k_BHSd.transpose(1, 2), v_BHSe.transpose(1, 2)

    def _rotate(self, x_BSHd: Tensor, position_ids: Tensor | None) -> Tensor:
        """Apply the rotary embedding, unless the operator includes it."""
        rotary = self.block.rotary
        if rotary is None or self.turns_inside:
            return x_BSHd
        positions = slice(0, x_BSHd.shape[1]) if position_ids is None else position_ids
        cos, sin = (table[positions][..., None, :] for table in (rotary.cos, rotary.sin))
        return rotate(x_BSHd, cos, sin, rotary.config.style)

    def _attend(self, q_BSHd: Tensor, k_BSHd: Tensor, v_BSHe: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of one stream (contrib operator ``GroupQueryAttention``, onnxruntime's ``ContribOperators.md``)."""
        batch, length, num_heads, width = q_BSHd.shape
        num_kv_heads, value_width = v_BSHe.shape[2:]
        padding = (0, value_width - width)
        total = torch.full((1,), length, dtype=torch.int32)
        inputs: list[Tensor | None] = [
            F.pad(q_BSHd, padding).flatten(2),
            F.pad(k_BSHd, padding).flatten(2),
            v_BSHe.flatten(2),
            None,  # past keys
            None,  # past values
            (total - 1).expand(batch),
            total,
        ]
        attributes: dict[str, Any] = {
            "num_heads": num_heads,
            "kv_num_heads": num_kv_heads,
            "scale": self.block.config.scale,
        }
        rotary = self.block.rotary
        if rotary is not None and self.turns_inside:
            inputs += [rotary.cos, rotary.sin]
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(rotary.config.style == "interleaved")}
        if bias is not None:
            inputs += [None] * (9 - len(inputs)) + [None, bias]
        if self.block.config.sliding_window is not None:
            attributes["local_window_size"] = self.block.config.sliding_window
        cache = (batch, num_kv_heads, length, value_width)
        output, _, _ = torch.onnx.ops.symbolic_multi_out(
            _OPERATOR,
            inputs,
            attributes,
            dtypes=(v_BSHe.dtype,) * 3,
            shapes=((batch, length, num_heads * value_width), cache, cache),
        )
        return output.reshape(batch, length, num_heads, value_width)


def _heads(x_BSD: Tensor, width: int) -> Tensor:
    return x_BSD.reshape(*x_BSD.shape[:2], -1, width)


def _by_stream(projection: nn.Linear, width: int) -> nn.ModuleList:
    """Split the rows ``[heads, 2, d]`` of a projection into one projection per stream."""
    parts = []
    for stream in (0, 1):

        def rows(weight: Tensor, stream: int = stream) -> nn.Parameter:
            pairs = weight.reshape(-1, 2, width, *weight.shape[1:])
            return nn.Parameter(pairs[:, stream].flatten(0, 1).contiguous(), requires_grad=False)

        part = nn.Linear(1, 1, bias=False, device="meta")
        part.weight = rows(projection.weight)
        part.bias = None if projection.bias is None else rows(projection.bias)
        parts.append(part)
    return nn.ModuleList(parts)


def _without_padding(k_BSHd: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Keys, with those of padding set to 0 in float16, where the bias that hides them may be smaller than a score."""
    if attention_mask is None or k_BSHd.dtype != torch.float16:
        return k_BSHd
    return k_BSHd.masked_fill((attention_mask == 0)[:, :, None, None], 0.0)


def _bias(x_BSD: Tensor, attention_mask: Tensor | None, config: AnyConfig) -> tuple[Tensor | None, Tensor | None]:
    """Bias ``[B, 1, S, S]`` that a padding mask adds to the scores, and the fully masked rows ``[B, S, 1, 1]``.

    Hidden keys get a large finite negative number: in a fully hidden block of keys, minus infinity would be subtracted
    from itself, which gives NaN.
    """
    if attention_mask is None:
        return None, None
    x_B1Sd = x_BSD[:, None]
    seen = visibility(
        x_B1Sd.expand(-1, 2, -1, -1),
        x_B1Sd,
        causal=True,
        attn_mask=attention_mask.to(torch.bool)[:, None, None],
        sliding_window=config.sliding_window,
    )
    assert seen.mask is not None
    assert seen.dead is not None
    smallest = torch.finfo(x_BSD.dtype).min
    bias = torch.zeros((), dtype=x_BSD.dtype).masked_fill(~seen.mask, smallest / 2)
    if x_BSD.dtype == torch.float16:
        # The operator keeps scores in float32, where outliers can make a score as large as the bias above. Padding gets
        # twice that bias, which is never added to a large negative score: padded keys score 0 here.
        bias = bias.masked_fill(~seen.mask & (attention_mask == 0)[:, None, None], smallest)
    return bias, seen.dead.transpose(1, 2)
