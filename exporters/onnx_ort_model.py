"""A model in onnxruntime's own operators: one ``GroupQueryAttention`` per layer, for both streams of all heads.

The operator counts the tokens of each row, and appends new keys and values to the past: in another buffer, or in place
if past and present are bound to the same buffer. As in all formats, keys are stored as ``[k1 | k2]`` after the rotary
embedding, which is therefore a separate operator: the embedding inside the attention operator would need the
halves of a pair interleaved.

Shape suffixes: B batch, H heads, S new tokens, P past tokens, T = P + S, d stream width, e value width.
"""

from typing import Any

import torch
from torch import Tensor

from diffdeploy.config import AnyConfig, DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.exporters.tracing import GraphModule
from diffdeploy.formats.onnx.names import ORT_ATTENTION, ORT_DOMAIN, ORT_ROTARY
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AttentionBlock, DiffTransformer
from diffdeploy.modules.block import KeyValueCache, Rotation
from diffdeploy.ops.request import Request
from diffdeploy.ops.rows import padded_queries

__all__ = ["OrtModelModule", "require_ort_model"]

# The operator needs widths that are multiples of this number.
_WIDTH = 8


def require_ort_model(config: DecoderConfig) -> None:
    """Reject models whose caches the operator does not support.

    Raises:
        InputError: keys and values differ in width, or the width is not a multiple of 8.
    """
    block = config.attention
    if block.key_cache_dim != block.value_dim:
        raise InputError(
            "onnxruntime's GroupQueryAttention needs keys and values of the same width, but those in the cache of this "
            f"model have {block.key_cache_dim} and {block.value_dim}; omit --onnx-flavor"
        )
    if block.value_dim % _WIDTH:
        raise InputError(
            "onnxruntime's GroupQueryAttention needs widths that are multiples of 8, but keys and values of this model "
            f"have {block.value_dim}; omit --onnx-flavor"
        )


class OrtModelModule(GraphModule):
    """A model with the signature of a graph, for export to ONNX only: torch cannot run it.

    Args:
        model: frozen model, in whose blocks some steps are replaced.
        spec: interface of a model whose rows are padded on the right.
    """

    def __init__(self, model: DiffTransformer, spec: GraphSpec) -> None:
        super().__init__(model, spec)
        self._steps = [_Steps(layer.self_attn) for layer in model.layers]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of the graph from its inputs, in the order of the spec, then the output of each layer."""
        model = self.block
        assert isinstance(model, DiffTransformer)
        inputs = dict(zip(self.spec.inputs, tensors, strict=True))
        mask_BT, names = inputs["attention_mask"], list(self.spec.caches)
        tokens_B = mask_BT.sum(1)
        rows = (tokens_B - 1).to(torch.int32), torch.full((1,), mask_BT.shape[1], dtype=torch.int32)
        turn = _rotation(model, inputs.get("position_ids"))
        x_BSD = model.embedding(inputs["input_ids"])
        outputs: dict[str, Tensor] = {}
        given: list[Tensor] = []
        for number, layer in enumerate(model.layers):
            steps = self._steps[number]
            steps.rows = rows
            keys, values = names[2 * number], names[2 * number + 1]
            x_BSD, _ = layer(x_BSD, None, turn, (inputs[keys], inputs[values]))
            outputs |= {self.spec.caches[keys]: steps.present[0], self.spec.caches[values]: steps.present[1]}
            given.append(x_BSD)
        if self.spec.logits == "last":
            # Position of the last token of a row, which padding may follow.
            past_length = mask_BT.shape[1] - x_BSD.shape[1]
            last_B = (tokens_B - past_length - 1).clamp(min=0)
            x_BSD = x_BSD.gather(1, last_B[:, None, None].expand(-1, 1, x_BSD.shape[2]))
        outputs[self.spec.main_output] = model.lm_head(model.norm(x_BSD))
        return (*(outputs[name] for name in self.spec.outputs), *given)


class _Steps:
    """The steps of a block that the operator replaces: appending to the cache, and attention.

    Attributes:
        rows: two int32 tensors: number of tokens of each row minus one ``[B]``, and length of the mask ``[1]``.
        present: keys and values including the new tokens, after `attend` was called.
    """

    rows: tuple[Tensor, Tensor]
    present: KeyValueCache

    def __init__(self, block: AttentionBlock) -> None:
        self._config: AnyConfig = block.config
        self._past: KeyValueCache | None = None
        # Set on the instance, so that the block's own steps call these methods.
        for name, step in (("append", self.append), ("attend", self.attend)):
            setattr(block, name, step)

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        """Return only the new tokens; see `AttentionBlock.append`."""
        self._past = past
        return new

    def attend(
        self, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSe: Tensor, lam: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Attention by ``GroupQueryAttention`` (onnxruntime's ``ContribOperators.md``); see `AttentionBlock.attend`."""
        assert self._past is not None
        assert mask is None
        config = self._config
        request = Request.of(q_BHSd, k_BHSd, v_BHSe, lam, causal=causal, gqa_layout=config.gqa_layout)
        queries = padded_queries(request)
        batch, num_heads, length, width = queries.shape
        attributes: dict[str, Any] = {
            "num_heads": num_heads,
            "kv_num_heads": config.num_kv_heads,
            "scale": config.scale,
        }
        if config.sliding_window is not None:
            attributes["local_window_size"] = config.sliding_window
        cache = (batch, config.num_kv_heads, self._past[0].shape[2] + length, width)
        output, *present = torch.onnx.ops.symbolic_multi_out(
            f"{ORT_DOMAIN}::{ORT_ATTENTION}",
            [*(side.transpose(1, 2).flatten(2) for side in (queries, k_BHSd, v_BHSe)), *self._past, *self.rows],
            attributes,
            dtypes=(q_BHSd.dtype,) * 3,
            shapes=((batch, length, num_heads * width), cache, cache),
        )
        self.present = present[0], present[1]
        streams = output.reshape(batch, length, -1, 2, width).transpose(1, 2)
        return streams[:, :, :, 0] - lam * streams[:, :, :, 1]


def _rotation(model: DiffTransformer, position_ids: Tensor | None) -> Rotation:
    """Function that rotates ``[B, H, S, d]`` with the contrib operator ``RotaryEmbedding``."""
    rotary = model.rotary
    if rotary is None or position_ids is None:
        return lambda x_BHSd: x_BHSd
    width = rotary.config.width(rotary.head_dim)

    def turn(x_BHSd: Tensor) -> Tensor:
        num_heads = x_BHSd.shape[1]
        x_BSD = x_BHSd.transpose(1, 2).flatten(2)
        turned = torch.onnx.ops.symbolic(
            f"{ORT_DOMAIN}::{ORT_ROTARY}",
            [x_BSD, position_ids, rotary.cos, rotary.sin],
            {
                "num_heads": num_heads,
                "rotary_embedding_dim": width,
                "interleaved": int(rotary.config.style == "interleaved"),
            },
            dtype=x_BSD.dtype,
            shape=x_BSD.shape,
        )
        return torch.unflatten(turned, 2, (num_heads, -1)).transpose(1, 2)

    return turn
