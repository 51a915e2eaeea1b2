"""`Runtime`: one interface to every format, with the input checks that backends do not make."""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError
from diffdeploy.formats import Backend, CacheBuffers
from diffdeploy.graphs import GraphSpec, zero_inputs
from diffdeploy.runtime.generation import GenerationOptions, Step, Streamer
from diffdeploy.runtime.inputs import as_integers, check_inputs
from diffdeploy.runtime.right_padding import run_right_padded
from diffdeploy.runtime.session import Session
from diffdeploy.runtime.text import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Runtime"]


class Runtime:
    """A loaded bundle. Call it with the inputs by name; safe to call from several threads.

    A context manager, which closes it.

    Args:
        bundle: an opened bundle.
        backend: its opened artifact.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Attributes:
        bundle: where it came from.
        spec: names, dtypes and ranges of inputs and outputs.
        device: where it runs.
    """

    def __init__(self, bundle: Bundle, backend: Backend, device: str) -> None:
        self.bundle = bundle
        self.device = device
        self.spec: GraphSpec = bundle.manifest.graph
        self._backend: Backend | None = backend
        self._description = backend.description

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        return self._description

    @property
    def verified(self) -> bool:
        """Whether verification accepted the bundle when it was made, and its report is there."""
        return self.bundle.verified

    def __call__(self, *unnamed: object, **inputs: "Tensor | Array") -> "dict[str, Any]":
        """Run the graph.

        Args:
            *unnamed: refused: inputs are given by name.
            **inputs: torch tensors or numpy arrays, as `spec` says; bfloat16 arrays are those of ``ml_dtypes``, and a
                mask may be boolean.

        Returns:
            Outputs by name: torch tensors, where the first input is, if that is one; else numpy arrays.

        Raises:
            InputError: a name, dtype, shape or value is not what `spec` accepts, or the runtime is closed. Values of
                tensors on CUDA are not looked at, since that would wait for the device.
        """
        backend = self._opened()
        if unnamed:
            raise InputError(
                f"{len(unnamed)} inputs have no name; accepted are the names {', '.join(self.spec.inputs)}"
            )
        inputs = as_integers(self.spec, inputs)
        check_inputs(self.spec, inputs)
        # Asked of numpy, since torch may not be installed.
        as_torch = not isinstance(inputs[self.spec.main_input], np.ndarray)
        if self.spec.padding != "anywhere":
            return self._right_padded(backend, inputs, as_torch=as_torch)
        return self._run(backend, inputs, as_torch=as_torch)

    def _run(self, backend: Backend, inputs: Mapping[str, Any], *, as_torch: bool) -> dict[str, Any]:
        # Backends take positions, and callers may name inputs in any order.
        outputs = backend.run([inputs[name] for name in self.spec.inputs], as_torch=as_torch)
        return dict(zip(self.spec.outputs, outputs, strict=True))

    def _right_padded(self, backend: Backend, inputs: Mapping[str, Any], *, as_torch: bool) -> dict[str, Any]:
        """Run a graph that counts tokens: where there is padding, arrays are moved in numpy."""
        arrays = {name: value if isinstance(value, np.ndarray) else to_array(value) for name, value in inputs.items()}
        outputs = run_right_padded(self.spec, arrays, partial(self._run, backend, as_torch=False))
        if not as_torch:
            return outputs
        device = inputs[self.spec.main_input].device
        return {name: to_tensor(array).to(device) for name, array in outputs.items()}

    def buffers(self, batch_size: int, capacity: int, fill: float = 0.0) -> CacheBuffers | None:
        """A cache that is written in place; see `Backend.buffers`.

        Raises:
            InputError: the runtime is closed.
        """
        return self._opened().buffers(batch_size, capacity, fill)

    def _opened(self) -> Backend:
        # Read once: another thread may close the runtime while this one calls it.
        if (backend := self._backend) is None:
            raise InputError(f"the runtime of {self.bundle.path} is closed; load the bundle again")
        return backend

    def generate(
        self,
        input_ids: "Tensor | Array",
        attention_mask: "Tensor | Array | None" = None,
        *,
        max_new_tokens: int,
        streamer: Streamer | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Any:
        """Continue prompts, in the terms of Hugging Face's ``generate``; of a bundle that holds a whole model.

        Args:
            input_ids: prompts ``[B, S]``, int64, padded at the left.
            attention_mask: ``[B, S]``, 0 for padding; by default there is none.
            max_new_tokens: most tokens to come.
            streamer: gets the prompt and every token as they come.
            **options: see `diffdeploy.runtime.generation.GenerationOptions`.

        Returns:
            Prompts and new tokens ``[B, S + new]``, int64: a torch tensor if ``input_ids`` is one, else an array.

        Raises:
            InputError: tokens, a mask, lengths or an option that are not accepted.
        """
        return self.session().generate(
            input_ids, attention_mask, max_new_tokens=max_new_tokens, streamer=streamer, **options
        )

    def stream(
        self,
        input_ids: "Tensor | Array",
        attention_mask: "Tensor | Array | None" = None,
        *,
        max_new_tokens: int,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Step]:
        """`generate`, with each token, and its text where the bundle has a tokenizer, as it comes.

        Joined, the texts of a row are all that the model wrote, up to the text of ``stop`` that ended it. A character
        comes with the token that completes it. What is not taken from the iterator is not computed.
        """
        return self.session().stream(input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)

    def session(self) -> Session:
        """A conversation, which goes on from turn to turn with one cache.

        Raises:
            InputError: the bundle holds a block.
        """
        return Session(self)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """From text to tokens and back.

        Raises:
            InputError: the bundle has none, or one that cannot be used.
            UnavailableError: the package tokenizers is not installed.
        """
        return Tokenizer(self.bundle)

    def warmup(self, **sizes: int) -> None:
        """Make one call, so that the first one in production does not pay for what backends put off until then.

        Args:
            **sizes: of axes, by their names; by default the smallest, and 64 positions, or as many as there can be.

        Raises:
            InputError: a size is out of its range.
        """
        self(**zero_inputs(self.spec, **sizes))

    def close(self) -> None:
        """Release the backend; later calls are refused."""
        # Taken away first, so that no call begins on a backend that is being closed.
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
