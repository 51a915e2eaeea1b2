"""`Session`: a conversation that continues with one cache."""

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
    """A conversation of prompts and the model's answers, turn by turn; no token is computed twice.

    A session must be used by one thread; several sessions may share a runtime.

    Args:
        runtime: runtime of a model.

    Raises:
        InputError: the bundle holds a block.
    """

    def __init__(self, runtime: "Runtime") -> None:
        if runtime.spec.variant != "model":
            raise InputError(f"{runtime.bundle.path} holds a block, which generates no tokens; export a whole model")
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
        """Yield each new token of `generate` as it is generated. Steps that are not requested are not computed."""
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
        """Continue all earlier turns; see `diffdeploy.runtime.Runtime.generate`.

        Args:
            input_ids: new tokens of this turn, ``[B, S]``, int64, padded on the left; ``B`` is the same in every turn.
            attention_mask: mask ``[B, S]``, 0 for padding; no padding by default.
            max_new_tokens: maximum number of new tokens.
            streamer: object that receives the new prompt and every new token as it is generated.
            **options: see `GenerationOptions`.

        Returns:
            Given and new tokens, ``[B, S + new]``, int64; a torch tensor if ``input_ids`` is one.

        Raises:
            InputError: tokens, the mask, lengths or an option are invalid; the session is then unchanged.
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
        # Tokens can be generated without text.
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
        # Set only after the turn is accepted, so that an invalid turn leaves no trace.
        self._context = context
        return found


def _array(name: str, value: "Tensor | Array") -> Array:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise InputError(f"{name} is a {type(value).__name__}; accepted: a torch tensor or a numpy array")
    return value if isinstance(value, np.ndarray) else to_array(value)
