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
    """A loaded bundle. Call it with inputs by name; calls from several threads are safe.

    It is also a context manager, and closes itself at the end of the ``with`` block.

    Args:
        bundle: an opened bundle.
        backend: its opened artifact.
        device: device that it runs on, ``cpu``, ``cuda`` or ``cuda:N``.

    Attributes:
        bundle: the bundle that was loaded.
        spec: names, dtypes and ranges of inputs and outputs.
        device: device that it runs on.
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
        """True if the bundle passed verification when it was made, and contains the report."""
        return self.bundle.verified

    def __call__(self, *unnamed: object, **inputs: "Tensor | Array") -> "dict[str, Any]":
        """Run the graph.

        Args:
            *unnamed: positional inputs, which raise an error: inputs are given by name.
            **inputs: torch tensors or numpy arrays, as defined by `spec`; bfloat16 arrays are those of ``ml_dtypes``,
                and a mask may be boolean.

        Returns:
            Outputs by name: torch tensors on the device of the first input if that is a tensor, else numpy arrays.

        Raises:
            InputError: a name, dtype, shape or value is not what `spec` accepts, or the runtime is closed. Values of
                tensors on CUDA are not checked, since that would wait for the device.
        """
        backend = self._opened()
        if unnamed:
            raise InputError(f"{len(unnamed)} inputs have no name; accepted: the names {', '.join(self.spec.inputs)}")
        inputs = as_integers(self.spec, inputs)
        check_inputs(self.spec, inputs)
        # Tested for numpy, since torch may not be installed.
        as_torch = not isinstance(inputs[self.spec.main_input], np.ndarray)
        if self.spec.padding != "anywhere":
            return self._right_padded(backend, inputs, as_torch=as_torch)
        return self._run(backend, inputs, as_torch=as_torch)

    def _run(self, backend: Backend, inputs: Mapping[str, Any], *, as_torch: bool) -> dict[str, Any]:
        # Backends take inputs by position, and callers may name them in any order.
        outputs = backend.run([inputs[name] for name in self.spec.inputs], as_torch=as_torch)
        return dict(zip(self.spec.outputs, outputs, strict=True))

    def _right_padded(self, backend: Backend, inputs: Mapping[str, Any], *, as_torch: bool) -> dict[str, Any]:
        """Run a graph that knows only how many tokens a row has; if there is padding, numpy rearranges the arrays."""
        arrays = {name: value if isinstance(value, np.ndarray) else to_array(value) for name, value in inputs.items()}
        outputs = run_right_padded(self.spec, arrays, partial(self._run, backend, as_torch=False))
        if not as_torch:
            return outputs
        device = inputs[self.spec.main_input].device
        return {name: to_tensor(array).to(device) for name, array in outputs.items()}

    def buffers(self, batch_size: int, capacity: int, fill: float = 0.0) -> CacheBuffers | None:
        """Create a cache that is updated in place; see `Backend.buffers`.

        Raises:
            InputError: the runtime is closed.
        """
        return self._opened().buffers(batch_size, capacity, fill)

    def _opened(self) -> Backend:
        # Read once, since another thread may close the runtime during this call.
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
        """Continue prompts, as Hugging Face's ``generate`` does, with a bundle that holds a whole model.

        Args:
            input_ids: prompts ``[B, S]``, int64, padded on the left.
            attention_mask: mask ``[B, S]``, 0 for padding; no padding by default.
            max_new_tokens: maximum number of new tokens.
            streamer: object that receives the prompt and every new token as it is generated.
            **options: see `diffdeploy.runtime.generation.GenerationOptions`.

        Returns:
            Prompts and new tokens ``[B, S + new]``, int64: a torch tensor if ``input_ids`` is one, else an array.

        Raises:
            InputError: tokens, the mask, lengths or an option are invalid.
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
        """Yield each new token of `generate` as it is generated, with its text if the bundle has a tokenizer.

        The joined texts of a row are the model's whole text, up to the ``stop`` text that ended it. A character is
        yielded with the token that completes it. Steps that are not requested from the iterator are not computed.
        """
        return self.session().stream(input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)

    def session(self) -> Session:
        """Start a conversation that continues from turn to turn with one cache.

        Raises:
            InputError: the bundle holds a block.
        """
        return Session(self)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that converts text to tokens and back.

        Raises:
            InputError: the bundle has no tokenizer, or an invalid one.
            UnavailableError: the package tokenizers is not installed.
        """
        return Tokenizer(self.bundle)

    def warmup(self, **sizes: int) -> None:
        """Make one call, so that the first call in production does not include the backend's deferred initialisation.

        Args:
            **sizes: sizes of axes by name; by default the smallest of each, except the sequence length, which is 64, or
                its maximum if that is less.

        Raises:
            InputError: a size is out of range.
        """
        self(**zero_inputs(self.spec, **sizes))

    def close(self) -> None:
        """Release the backend; later calls raise an error."""
        # Cleared first, so that no call starts on a backend that is being closed.
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
