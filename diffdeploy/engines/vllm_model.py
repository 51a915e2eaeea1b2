"""``DiffLlamaForCausalLM`` for vLLM, built from vLLM's stock layers; vLLM imports this module to serve such a model.

The paired cache holds keys ``[k1 | k2]`` and values of width ``2d``. Both streams together are then one grouped-query
attention with ``2h`` query heads of width ``2d``: ``[q1 | 0]`` and ``[0 | q2]``. A key/value head of vLLM is therefore
a pair, which tensor parallelism, paged and prefix caches, chunked prefill and every backend treat like any other head.

Shape suffixes: N tokens, h heads of this rank, d stream width.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from diffdeploy.config import LAMBDA_VECTORS, lambda_init_at

__all__ = ["DiffLlamaForCausalLM", "PairedDiffAttention"]


class PairedDiffAttention(nn.Module):
    """Differential attention of one layer (arXiv 2410.05258, equations 1 to 3), built from vLLM's layers.

    Args:
        config: config of transformers, which counts streams as heads.
        num_heads: number of query streams ``2h`` of all ranks.
        num_kv_heads: number of key/value streams ``2 h_kv`` of all ranks.
        hidden_size: model width.
        max_position_embeddings: longest sequence.
        quant_config: quantisation of the weights.
        bias: true if the projections of queries, keys and values have biases.
        bias_o_proj: true if the output projection has one.
        cache_config: cache settings of the engine.
        prefix: prefix of the names of its weights.

    Raises:
        ValueError: the heads do not form whole pairs on every rank.
    """

    lam: Tensor
    gain: Tensor
    lambda_q1: Tensor
    lambda_k1: Tensor
    lambda_q2: Tensor
    lambda_k2: Tensor

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: Any,
        bias: bool,
        bias_o_proj: bool,
        cache_config: Any,
        prefix: str,
        **_: Any,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if num_heads % 2 or num_kv_heads % 2 or (num_heads // 2) % ranks:
            raise ValueError(
                f"the model has {num_heads} query and {num_kv_heads} key/value streams, and a pair must be on one "
                f"rank; accepted: tensor parallel sizes that divide {num_heads // 2}, not {ranks}"
            )
        self.head_dim = d = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.qkv_proj = QKVParallelLinear(
            hidden_size, 2 * d, num_heads // 2, num_kv_heads // 2, bias=bias, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            num_heads * d, hidden_size, bias=bias_o_proj, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        # Taken from the projection, which repeats key/value heads if there are more ranks than heads.
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.rotary_emb = get_rope(
            d, max_position=max_position_embeddings, rope_parameters=config.rope_parameters, is_neox_style=True
        )
        self.attn = Attention(
            2 * self.num_heads,
            2 * d,
            d**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        for name in LAMBDA_VECTORS:
            # Stored in float32 whatever the model's dtype: rounding these vectors would cause a larger error than all
            # other roundings in the computation of lambda.
            setattr(self, name, nn.Parameter(torch.zeros(d, dtype=torch.float32), requires_grad=False))
        self.eps = config.rms_norm_eps
        self.lambda_init = lambda_init_at(extract_layer_index(prefix))
        # Buffers, and not numbers in the code, so that layers that differ in nothing else share compiled code.
        self.register_buffer("lam", torch.tensor(self.lambda_init, dtype=torch.float32), persistent=False)
        self.register_buffer("gain", torch.tensor(1 - self.lambda_init, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def settle(self) -> None:
        """Compute lambda from its vectors, once they are loaded."""
        first = torch.exp(torch.sum(self.lambda_q1.double() * self.lambda_k1.double()))
        second = torch.exp(torch.sum(self.lambda_q2.double() * self.lambda_k2.double()))
        self.lam.copy_(first - second + self.lambda_init)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute attention for the tokens of a batch, which are concatenated.

        Args:
            positions: positions of the tokens, ``[N]``.
            hidden_states: hidden states of the tokens, ``[N, D]``.

        Returns:
            Output, ``[N, D]``.
        """
        d, pair = self.head_dim, 2 * self.head_dim
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.num_heads * pair, self.num_kv_heads * pair, self.num_kv_heads * pair], dim=-1)
        # Rotated stream by stream: for the rotary embedding, heads are d wide and contiguous.
        q, k = self.rotary_emb(positions, q, k)
        q_Nh2d = q.view(-1, self.num_heads, 2, d)
        zeros = torch.zeros_like(q_Nh2d[:, :, 0])
        signal, noise = torch.cat((q_Nh2d[:, :, 0], zeros), -1), torch.cat((zeros, q_Nh2d[:, :, 1]), -1)
        padded = torch.stack((signal, noise), dim=2).view(-1, self.num_heads * 2 * pair)
        streams = self.attn(padded, k.contiguous(), v.contiguous()).view(-1, self.num_heads, 2, pair)
        # The kernel rounds both streams to the dtype of the model; the rest is computed in float32.
        o_Nhe = streams[:, :, 0].float() - self.lam * streams[:, :, 1].float()
        o_Nhe = o_Nhe * torch.rsqrt(o_Nhe.square().mean(-1, keepdim=True) + self.eps) * self.gain
        output: Tensor
        output, _ = self.o_proj(o_Nhe.to(hidden_states.dtype).view(-1, self.num_heads * pair))
        return output


class DiffLlamaDecoderLayer(LlamaDecoderLayer):
    """A layer of Llama with differential attention."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=PairedDiffAttention)


class DiffLlamaForCausalLM(LlamaForCausalLM):
    """Llama with differential attention, from checkpoints of transformers' ``DiffLlamaForCausalLM``."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        # `load_weights` does not load adapters, and their rows would stay in the order of the checkpoint.
        if vllm_config.lora_config is not None:
            raise ValueError(
                "LoRA adapters were requested, but their rows are not in the order that vLLM uses for "
                "differential attention; merge them into the checkpoint"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=DiffLlamaDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights, with the streams of each head side by side."""
        loaded: set[str] = super().load_weights(self._paired(weights))
        return loaded

    def process_weights_after_loading(self) -> None:
        """Compute each layer's lambda; vLLM calls this for every source of weights."""
        for module in self.modules():
            if isinstance(module, PairedDiffAttention):
                module.settle()

    def _paired(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Reorder outputs of q, k and v from ``[2, n, d]`` to ``[n, 2, d]``, in all tensors of a quantised weight."""
        parameters = dict(self.named_parameters())
        streams = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        streams["v_proj"] = streams["k_proj"]
        for name, tensor in weights:
            projection = next((p for p in streams if f".self_attn.{p}." in name), None)
            # A single number for the whole projection has no order.
            if projection is None or tensor.numel() == 1:
                yield name, tensor
                continue
            parameter = parameters.get(name.replace(projection, "qkv_proj"))
            axis = None if parameter is None else getattr(parameter, "output_dim", None)
            yield name, _side_by_side(name, tensor, axis, streams[projection])


def _side_by_side(name: str, tensor: Tensor, axis: int | None, num_streams: int) -> Tensor:
    """Reorder a tensor so that its heads form pairs.

    Args:
        name: name of the tensor, for the error.
        tensor: weights, packed or not, scales or biases.
        axis: axis of the outputs; ``None`` if there is none.
        num_streams: number of streams along that axis.

    Raises:
        ValueError: the outputs of several streams are stored together.
    """
    if axis is None:
        return tensor
    if tensor.shape[axis] % num_streams:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, so its outputs cannot be separated into {num_streams} streams; "
            "accepted: quantisation schemes whose groups of outputs do not cross heads"
        )
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    halves = tensor.reshape(*before, 2, num_streams // 2, -1, *after)
    return halves.transpose(axis, axis + 1).reshape(tensor.shape)
