"""Loading a candidate as calls that can be timed: one for the prompt, and one that generates the tokens after it.

Decoding with a bundle does the same as `Runtime.generate`, with a cache that is updated in place if possible. The eager
model and transformers pass their caches from call to call, and choose tokens in the same way, without the overhead of
their libraries.

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
    """Decoding after a past.

    Attributes:
        logits: logits ``[B, V]`` after the past and one more token.
        call: function that generates `NEW_TOKENS` tokens.
        bare_call: the runtime's call for the middle one of these tokens; ``None`` if there is no such call.
    """

    logits: Array
    call: Call
    bare_call: Call | None


class ModelRun(ABC):
    """A loaded candidate."""

    @abstractmethod
    def prefill(self, tokens_BS: Array) -> Array:
        """Logits ``[B, V]`` after the prompts."""

    @abstractmethod
    def decoder(self, tokens_BS: Array) -> Decoder:
        """Prepare decoding after all but the last token of each row, which is fed first."""


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
        # Reserves space for all new tokens at once, as `Runtime.generate` does.
        decoding.reserve(ones.shape[1])
        decoding.feed(past, ones[:, : length - 1])

        def generate() -> None:
            # The past is kept; each sample overwrites the same positions after it, or creates new caches.
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
        # Halfway, where the cost of a call is average.
        halfway = copy.copy(decoding)
        for place in range(length, length + NEW_TOKENS // 2):
            halfway.feed(last, ones[:, :place])
        return Decoder(logits, generate, halfway.bare_call(last, ones[:, : length + NEW_TOKENS // 2]))


class _TorchRun(ModelRun):
    """A torch model whose cache is passed from call to call.

    Attributes:
        device: device of the model.
    """

    device: str

    def prefill(self, tokens_BS: Array) -> Array:
        import torch

        logits, _ = self._step(torch.from_numpy(tokens_BS).to(self.device), None)
        return to_array(logits)

    def decoder(self, tokens_BS: Array) -> Decoder:
        import torch

        tokens = torch.from_numpy(tokens_BS).to(self.device)
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
        """Logits ``[B, V]`` of the last position, and the extended cache."""

    def _kept(self, cache: Any, length: int) -> Any:  # noqa: ARG002 - for caches that are updated in place
        """The cache with only its first ``length`` tokens, without any that were appended later."""
        return cache


class _EagerRun(_TorchRun):
    def __init__(self, plan: ModelPlan, impl: str) -> None:
        import torch

        from diffdeploy.bundle import frozen_module, read_tensors

        self.device = plan.device
        dtype = getattr(torch, plan.dtype)
        self._model: Any = frozen_module(
            plan.config,
            read_tensors(opened(plan.bundle)),
            impl=impl,
            max_positions=plan.max_length,
            dtype=dtype,
        ).to(plan.device)

    def _step(self, tokens: "Tensor", cache: Any) -> tuple["Tensor", Any]:
        import torch

        batch, length = tokens.shape
        block = self._model.config.attention
        if cache is None:
            dtype = self._model.embedding.weight.dtype
            empty = [torch.empty(batch, block.num_kv_heads, 0, width, dtype=dtype, device=self.device)
                     for width in (block.key_cache_dim, block.value_dim)]  # fmt: skip
            cache = [tuple(empty)] * self._model.config.num_layers
        mask = torch.ones(batch, cache[0][0].shape[2] + length, dtype=torch.int64, device=self.device)
        logits, cache = self._model(tokens, mask, None, cache, last_only=True)
        return logits[:, -1], cache


class _TransformersRun(_TorchRun):
    def __init__(self, plan: ModelPlan, candidate: ModelCandidate) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = plan.device
        self._model: Any = (
            AutoModelForCausalLM.from_pretrained(
                candidate.path,
                dtype=getattr(torch, plan.dtype),
                attn_implementation=candidate.choice,
                local_files_only=True,
            )
            .to(plan.device)
            .eval()
        )

    def _step(self, tokens: "Tensor", cache: Any) -> tuple["Tensor", Any]:
        from transformers import DynamicCache

        cache = DynamicCache() if cache is None else cache
        found = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found.past_key_values

    def _kept(self, cache: Any, length: int) -> Any:
        # Its cache is updated in place.
        if (new := cache.get_seq_length() - length) > 0:
            # Versions of transformers interpret a length differently, but agree on a number of tokens to remove.
            cache.crop(-new)
        return cache


def open_model(plan: ModelPlan, candidate: ModelCandidate) -> ModelRun:
    """Load a candidate."""
    if candidate.kind == "eager":
        return _EagerRun(plan, candidate.choice)
    if candidate.kind == "transformers":
        return _TransformersRun(plan, candidate)
    assert candidate.path is not None
    # Trust in a bundle was checked when it was chosen.
    return _BundleRun(open_runtime(candidate.path, RunOptions(device=plan.device, threads=plan.threads, trust=True)))
