"""The facts about a DiffLlama config that vLLM needs before it builds a model."""

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

__all__ = ["DiffLlamaConfigConvertor"]


class DiffLlamaConfigConvertor(ModelArchConfigConvertorBase):
    """Sizes of the cache, in which each head is a pair of streams."""

    def get_head_size(self) -> int:
        """Width of a head in the cache, ``2d``."""
        return 2 * int(super().get_head_size())

    def get_total_num_kv_heads(self) -> int:
        """Number of key/value heads, ``h_kv``; the config counts their streams."""
        return int(super().get_total_num_kv_heads()) // 2
