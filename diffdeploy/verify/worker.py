"""The process that runs an artifact: it has not exported it, and knows only the bundle and the public runtime.

Frames on its standard input and output are one line of JSON, with names, dtypes and shapes of arrays, followed by the
bytes of those arrays. Nothing else is written to standard output; what backends print there goes to standard error.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.formats import RunOptions
from diffdeploy.processes import WorkerProcess

if TYPE_CHECKING:
    from diffdeploy.runtime import Runtime

__all__ = ["Artifact", "ArtifactProcess", "answered"]

# Cells that a cache has beyond the last token.
_ROOM = 3


def _send(stream: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    stream.write(json.dumps({**header, "arrays": shapes}).encode() + b"\n")
    for array in arrays.values():
        stream.write(array.tobytes())
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]] | None:
    line = stream.readline()
    if not line:
        return None
    header = json.loads(line)
    arrays: dict[str, Array] = {}
    for name, (dtype, shape) in header["arrays"].items():
        size = np.dtype(dtype).itemsize * math.prod(shape)
        # Writable, as inputs and outputs are elsewhere; bytes are not.
        arrays[name] = np.frombuffer(bytearray(stream.read(size)), dtype).reshape(shape)
    return header, arrays


class Artifact(Protocol):
    """What a verification runs: an `ArtifactProcess`, or what stands for one."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def backend(self) -> str:
        """What runs it; waits until it is loaded."""
        ...

    def start(self, inputs: Mapping[str, Array]) -> None:
        """Hand over an input."""
        ...

    def result(self) -> dict[str, Array]:
        """Outputs by name of the input that was started."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Both."""
        ...

    def decode(self, inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
        """Logits and caches of a model as generation finds them, with the last tokens decoded one by one."""
        ...

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        """Prompts of a model and so many greedy tokens behind them."""
        ...


def answered(runtime: "Runtime", header: Mapping[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
    """What a runtime answers: to a call, or to what the header asks for.

    Args:
        runtime: of the bundle.
        header: ``decode`` or ``generate`` with a number of tokens, or nothing.
        arrays: inputs by name.

    Raises:
        ExportError: an artifact that writes in place wrote beyond the last token.
    """
    if "decode" in header:
        return _decoded(runtime, arrays, header["decode"])
    if "generate" in header:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        return {"tokens": runtime.generate(ids, mask, max_new_tokens=header["generate"], eos_token_id=None)}
    outputs: dict[str, Array] = runtime(**arrays)
    return outputs


def _decoded(runtime: "Runtime", inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
    """Logits and caches by the names of the graph, as generation finds them.

    Args:
        runtime: of a model.
        inputs: by the names of the graph, without a past.
        num_tokens: of the last tokens of every row, which are decoded one by one behind the rest.

    Returns:
        Logits ``[B, 1 + num_tokens, V]`` of the prompts' last position and of the tokens, and the caches.
    """
    from diffdeploy.runtime.decoding import Decoding

    ids, mask, length = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1]
    # What would show in every result if it was read, and room behind.
    decoding = Decoding(runtime, len(ids), fill=np.nan)
    decoding.reserve(length + _ROOM)
    # Another batch of sequences takes turns with it: what both share would show in the second turn.
    other, others = Decoding(runtime, len(ids)), np.ascontiguousarray(ids[::-1, ::-1])
    other.reserve(length + _ROOM)
    logits = []
    for end in range(length - num_tokens, length + 1):
        logits.append(decoding.feed(ids[:, decoding.num_tokens : end], mask[:, :end]))
        other.feed(others[:, other.num_tokens : end], np.ones_like(mask[:, :end]))
    for name, buffer in ({} if decoding.buffers is None else decoding.buffers.arrays()).items():
        if not np.isnan(buffer[:, :, length:].astype(np.float32)).all():
            raise ExportError(f"cells of {name} beyond the last token were written")
    return {runtime.spec.main_output: np.stack(logits, axis=1), **decoding.caches(mask)}


class ArtifactProcess:
    """A fresh process that has loaded a bundle. `start` an input, do something else, then take its `result`.

    Use it as a context manager; the process ends with the block.

    Args:
        bundle: directory of the bundle.
        options: what it is run with.
    """

    def __init__(self, bundle: Path, options: RunOptions) -> None:
        given = json.dumps(asdict(options), default=str)  # the key's path
        self._process = WorkerProcess(__name__, [str(bundle.absolute()), given], takes_input=True)
        self._backend: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, traceback)

    @property
    def backend(self) -> str:
        """What runs the artifact; waits until it is loaded.

        Raises:
            ExportError: the runtime cannot load the bundle.
        """
        if self._backend is None:
            try:
                header, _ = self._answer()
            except ExportError as error:
                raise ExportError(f"the runtime could not load the artifact: {error}") from error
            self._backend = str(header["backend"])
        return self._backend

    def start(self, inputs: Mapping[str, Array]) -> None:
        """Hand over an input without waiting for the output."""
        self._ask({}, inputs)

    def _ask(self, header: Mapping[str, Any], inputs: Mapping[str, Array]) -> None:
        self.backend  # noqa: B018 - the first answer is that the artifact is loaded
        with suppress(BrokenPipeError):  # `result` says how it died
            _send(self._process.stdin, header, inputs)

    def result(self) -> dict[str, Array]:
        """Outputs by name of the input that was started.

        Raises:
            ExportError: the artifact did not run.
        """
        _, outputs = self._answer()
        return outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, waited for.

        Raises:
            ExportError: the artifact did not run.
        """
        self.start(inputs)
        return self.result()

    def decode(self, inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
        """See `Artifact.decode`; raises ExportError where the artifact did not run."""
        self._ask({"decode": num_tokens}, inputs)
        return self.result()

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        """See `Artifact.generate`; raises ExportError where the artifact did not run."""
        self._ask({"generate": num_tokens}, inputs)
        return self.result()["tokens"]

    def _answer(self) -> tuple[dict[str, Any], dict[str, Array]]:
        frame = _receive(self._process.stdout)
        if frame is None:
            raise ExportError(f"the process running it {self._process.obituary()}")
        if "error" in frame[0]:
            raise ExportError(frame[0]["error"])
        return frame


def _main(bundle: str, options: str) -> int:
    # Frames keep a copy of standard output; what C code prints to descriptor 1 must not land between them.
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Imported once printing is out of the way.
    from diffdeploy.runtime import open_runtime

    try:
        runtime = open_runtime(bundle, RunOptions(**json.loads(options)))
    except DiffDeployError as error:
        _send(stdout, {"error": str(error)}, {})
        return error.exit_code
    _send(stdout, {"backend": runtime.description}, {})
    while (frame := _receive(stdin)) is not None:
        try:
            outputs = answered(runtime, *frame)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is the finding
            _send(stdout, {"error": f"{type(error).__name__}: {error}"}, {})
            continue  # one input that fails says nothing of the next
        _send(stdout, {}, outputs)
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
