"""From a candidate to calls that can be timed: the prompt, and tokens one by one behind it.

Decoding of a bundle is what `Runtime.generate` does, cache written in place where the backend can. The eager model and
transformers hand their caches on, and choose tokens in the same way, without what their libraries add around that.

Shape suffixes: B batch, S prompt, P past, N new tokens, V vocabulary.
"""

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffdeploy.arrays import Array, to_array
from diffdeploy.bench.models.plan import NEW_TOKENS, ModelCandidate, ModelPlan, opened
from diffdeploy.formats import RunOptions
from diffdeploy.runtime import Runtime, open_runtime
from diffdeploy.runtime.decoding import Decoding
from diffdeploy.runtime.generation import Context, steps

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Decoder", "ModelRun", "open_model"]

Call = Callable[[], object]


class Decoder(NamedTuple):
    """Decoding behind a past.

    Attributes:
        logits: ``[B, V]`` behind the past and one token more.
        call: generates `NEW_TOKENS` tokens.
        bare_call: what the runtime is called with for one of them, halfway; ``None`` where there is no such call.
    """

    logits: Array
    call: Call
    bare_call: Call | None


class ModelRun(ABC):
    """A loaded candidate."""

    @abstractmethod
    def prefill(self, tokens_BS: Array) -> Array:
        """Logits ``[B, V]`` behind prompts."""

    @abstractmethod
    def decoder(self, tokens_BS: Array) -> Decoder:
        """Decoding behind all but the last token of each row, which is the first to be fed."""


class _BundleRun(ModelRun):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def prefill(self, tokens_BS: Array) -> Array:
        return Decoding(self._runtime, len(tokens_BS)).feed(tokens_BS, np.ones_like(tokens_BS))

    def decoder(self, tokens_BS: Array) -> Decoder:
        runtime, (batch, length) = self._runtime, tokens_BS.shape
        ones = np.ones((batch, length - 1 + NEW_TOKENS), np.int64)
        past, last = np.ascontiguousarray(tokens_BS[:, :-1]), np.ascontiguousarray(tokens_BS[:, -1:])
        decoding = Decoding(runtime, batch)
        # Room for all that is generated, as generation makes it.
        decoding.reserve(ones.shape[1])
        decoding.feed(past, ones[:, : length - 1])

        def generate() -> None:
            # What was fed stays: behind it the same cells are written again, or other caches made.
            context = Context(past, np.ones_like(past), np.zeros(past.shape, bool), copy.copy(decoding))
            found = steps(
                runtime,
                context,
                last,
                None,
                max_new_tokens=NEW_TOKENS,
                with_text=False,
                options={"eos_token_id": None},
            )
            deque(found, maxlen=0)

        logits = copy.copy(decoding).feed(last, ones[:, :length])
        # Halfway, where a call costs what they do on average.
        halfway = copy.copy(decoding)
        for place in range(length, length + NEW_TOKENS // 2):
            halfway.feed(last, ones[:, :place])
        return Decoder(logits, generate, halfway.bare_call(last, ones[:, : length + NEW_TOKENS // 2]))


class _TorchRun(ModelRun):
    """A torch model with a cache that is handed on."""

    def prefill(self, tokens_BS: Array) -> Array:
        import torch

        logits, _ = self._step(torch.from_numpy(tokens_BS), None)
        return to_array(logits)

    def decoder(self, tokens_BS: Array) -> Decoder:
        import torch

        tokens = torch.from_numpy(tokens_BS)
        past_length = tokens_BS.shape[1] - 1
        _, cache = self._step(tokens[:, :-1], None)

        def generate() -> None:
            given, new = self._kept(cache, past_length), tokens[:, -1:]
            for _ in range(NEW_TOKENS):
                logits, given = self._step(new, given)
                new = logits.argmax(1, keepdim=True)

        logits, _ = self._step(tokens[:, -1:], self._kept(cache, past_length))
        return Decoder(to_array(logits), generate, None)

    @abstractmethod
    def _step(self, tokens: "Tensor", cache: Any) -> tuple["Tensor", Any]:
        """Logits ``[B, V]`` of the last position, and the cache with the tokens."""

    def _kept(self, cache: Any, length: int) -> Any:  # noqa: ARG002 - of caches that take tokens in themselves
        """A cache of so many tokens, whatever came behind them."""
        return cache


class _EagerRun(_TorchRun):
    def __init__(self, plan: ModelPlan, impl: str) -> None:
        import torch

        from diffdeploy.bundle import frozen_module, read_tensors

        dtype = getattr(torch, plan.dtype)
        self._model: Any = frozen_module(
            plan.config,
            read_tensors(opened(plan.bundle)),
            impl=impl,
            max_positions=plan.max_length,
            dtype=dtype,
        )

    def _step(self, tokens: "Tensor", cache: Any) -> tuple["Tensor", Any]:
        import torch

        batch, length = tokens.shape
        block = self._model.config.attention
        if cache is None:
            dtype = self._model.embedding.weight.dtype
            empty = [torch.empty(batch, block.num_kv_heads, 0, width, dtype=dtype)
                     for width in (block.key_cache_dim, block.value_dim)]  # fmt: skip
            cache = [tuple(empty)] * self._model.config.num_layers
        mask = torch.ones(batch, cache[0][0].shape[2] + length, dtype=torch.int64)
        logits, cache = self._model(tokens, mask, None, cache, last_only=True)
        return logits[:, -1], cache


class _TransformersRun(_TorchRun):
    def __init__(self, plan: ModelPlan, candidate: ModelCandidate) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            candidate.path,
            dtype=getattr(torch, plan.dtype),
            attn_implementation=candidate.choice,
            local_files_only=True,
        ).eval()

    def _step(self, tokens: "Tensor", cache: Any) -> tuple["Tensor", Any]:
        from transformers import DynamicCache

        cache = DynamicCache() if cache is None else cache
        found = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found.past_key_values

    def _kept(self, cache: Any, length: int) -> Any:
        # Its cache takes new tokens in itself.
        if (new := cache.get_seq_length() - length) > 0:
            # Versions differ in what they make of a length, and agree on a number to take away.
            cache.crop(-new)
        return cache


def open_model(plan: ModelPlan, candidate: ModelCandidate) -> ModelRun:
    """Load a candidate."""
    if candidate.kind == "eager":
        return _EagerRun(plan, candidate.choice)
    if candidate.kind == "transformers":
        return _TransformersRun(plan, candidate)
    assert candidate.path is not None
    # Whether a bundle is trusted was asked when it was chosen.
    return _BundleRun(open_runtime(candidate.path, RunOptions(device="cpu", threads=plan.threads, trust=True)))
