"""`Session`: a conversation that goes on, with one cache for all of it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.errors import DiffDeployError, InputError
from diffdeploy.runtime.generation import Context, GenerationOptions, Step, Streamer, steps

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.runtime.runtime import Runtime

__all__ = ["Session"]


class Session:
    """Prompts and what a model wrote behind them, one turn after the other; no token is computed twice.

    Of one thread; several sessions may share a runtime.

    Args:
        runtime: of a model.

    Raises:
        InputError: the bundle holds a block.
    """

    def __init__(self, runtime: "Runtime") -> None:
        if runtime.spec.variant != "model":
            raise InputError(f"{runtime.bundle.path} holds a block, which gives no tokens; export a whole model")
        self._runtime = runtime
        self._context: Context | None = None

    @property
    def tokens(self) -> Array:
        """All tokens of all turns so far, ``[B, T]``, int64, padding included; ``[0, 0]`` before the first turn."""
        return np.zeros((0, 0), np.int64) if self._context is None else self._context.tokens.copy()

    def stream(
        self,
        input_ids: "Tensor | Array",
        attention_mask: "Tensor | Array | None" = None,
        *,
        max_new_tokens: int,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Step]:
        """`generate`, with each token as it comes. What is not taken from the iterator is not computed."""
        prompt = _array("input_ids", input_ids)
        return self._steps(prompt, attention_mask, max_new_tokens, options, with_text=self._has_tokenizer())

    def generate(
        self,
        input_ids: "Tensor | Array",
        attention_mask: "Tensor | Array | None" = None,
        *,
        max_new_tokens: int,
        streamer: Streamer | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Any:
        """`diffdeploy.runtime.Runtime.generate` behind all turns before.

        Args:
            input_ids: what is new in this turn, ``[B, S]``, int64, padded at the left; of as many rows in every turn.
            attention_mask: ``[B, S]``, 0 for padding; by default there is none.
            max_new_tokens: most tokens to come.
            streamer: gets what is new and every token as they come.
            **options: see `GenerationOptions`.

        Returns:
            What was given and new tokens, ``[B, S + new]``, int64; a torch tensor if ``input_ids`` is one.

        Raises:
            InputError: tokens, a mask, lengths or an option that are not accepted; the session is as it was before.
        """

        def as_given(array: Array) -> Any:
            return array if isinstance(input_ids, np.ndarray) else to_tensor(array).to(input_ids.device)

        prompt = _array("input_ids", input_ids)
        columns = [prompt]
        found = self._steps(prompt, attention_mask, max_new_tokens, options, with_text=False)
        if streamer is not None:
            streamer.put(as_given(prompt))
        for step in found:
            columns.append(step.tokens[:, None])
            if streamer is not None:
                streamer.put(as_given(step.tokens))
        if streamer is not None:
            streamer.end()
        return as_given(np.concatenate(columns, axis=1))

    def _has_tokenizer(self) -> bool:
        try:
            return self._runtime.tokenizer is not None
        # Tokens can be had without text.
        except DiffDeployError:
            return False

    def _steps(
        self,
        prompt: Array,
        attention_mask: "Tensor | Array | None",
        max_new_tokens: int,
        options: GenerationOptions,
        *,
        with_text: bool,
    ) -> Iterator[Step]:
        context = self._context or Context.empty(self._runtime, len(prompt))
        mask = None if attention_mask is None else _array("attention_mask", attention_mask)
        found = steps(
            self._runtime,
            context,
            prompt,
            mask,
            max_new_tokens=max_new_tokens,
            with_text=with_text,
            options=options,
        )
        # Only now that the turn is accepted: a refused one leaves no trace.
        self._context = context
        return found


def _array(name: str, value: "Tensor | Array") -> Array:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise InputError(f"{name} is a {type(value).__name__}; accepted is a torch tensor or a numpy array")
    return value if isinstance(value, np.ndarray) else to_array(value)
