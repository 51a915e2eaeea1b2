"""The process that runs an artifact. It did not export the artifact, and uses only the bundle and the public runtime.

Frames on its standard input and output are one line of JSON, with names, dtypes and shapes of arrays, followed by the
bytes of those arrays. Nothing else is written to standard output; the output of backends is redirected to standard
error.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.formats import RunOptions
from diffdeploy.processes import WorkerProcess, return_freed_memory

if TYPE_CHECKING:
    from diffdeploy.runtime import Runtime

__all__ = ["Artifact", "ArtifactProcess", "answered"]

# Number of cache cells beyond the last token.
_ROOM = 3
# Exact in every dtype, and far larger than keys and values are.
_CONSPICUOUS = 8192.0


def _send(stream: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    stream.write(json.dumps({**header, "arrays": shapes}).encode() + b"\n")
    for array in arrays.values():
        stream.write(_bytes_of(np.ascontiguousarray(array)))
    stream.flush()


def _bytes_of(array: Array) -> memoryview:
    """The memory of a contiguous array. Caches of a model are hundreds of megabytes, of which a copy would count."""
    return array.reshape(-1).view(np.uint8).data


def _receive(stream: BufferedIOBase) -> tuple[dict[str, Any], dict[str, Array]] | None:
    line = stream.readline()
    if not line:
        return None
    header = json.loads(line)
    arrays: dict[str, Array] = {}
    for name, (dtype, shape) in header["arrays"].items():
        arrays[name] = np.empty(shape, dtype)
        if stream.readinto(_bytes_of(arrays[name])) < arrays[name].nbytes:
            return None  # the other process ended in the middle
    return header, arrays


class Artifact(Protocol):
    """Interface of a verified artifact: an `ArtifactProcess`, or a substitute."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def backend(self) -> str:
        """Backend that runs the artifact; waits until the artifact is loaded."""
        ...

    def start(self, inputs: Mapping[str, Array]) -> None:
        """Pass an input."""
        ...

    def result(self) -> dict[str, Array]:
        """Outputs by name for the input that `start` passed."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Pass an input and return its outputs by name."""
        ...

    def decode(self, inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
        """Logits and caches of a model as in generation, with the last tokens decoded one by one."""
        ...

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        """Prompts of a model, followed by a number of greedy tokens."""
        ...


def answered(runtime: "Runtime", header: Mapping[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
    """Compute a runtime's answer to a plain call or to a request in the header.

    Args:
        runtime: runtime of the bundle.
        header: ``decode`` or ``generate`` with a number of tokens, or nothing.
        arrays: inputs by name.

    Raises:
        ExportError: an artifact that updates caches in place wrote beyond the last token.
    """
    if "decode" in header:
        return _decoded(runtime, arrays, header["decode"])
    if "generate" in header:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        return {"tokens": runtime.generate(ids, mask, max_new_tokens=header["generate"], eos_token_id=None)}
    outputs: dict[str, Array] = runtime(**arrays)
    return outputs


def _decoded(runtime: "Runtime", inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
    """Logits and caches by the names of the graph, as in generation.

    Args:
        runtime: runtime of a model.
        inputs: inputs by the names of the graph, without a past.
        num_tokens: number of tokens at the end of every row that are decoded one by one after the rest.

    Returns:
        Logits ``[B, 1 + num_tokens, V]`` of the prompts' last position and of the tokens, and the caches.
    """
    from diffdeploy.runtime.decoding import Decoding

    ids, mask, length = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1]
    # Cells beyond the end are filled with a value that would change every result if it were read. Kernels on a GPU read
    # whole tiles, and multiply what lies beyond the end by weights of 0, so on a GPU the fill must not be NaN.
    fill = np.nan if runtime.device == "cpu" else _CONSPICUOUS
    decoding = Decoding(runtime, len(ids), fill=fill)
    decoding.reserve(length + _ROOM)
    # Another batch of sequences alternates with this one. If the two shared any state, the second turn would show it.
    other, others = Decoding(runtime, len(ids)), np.ascontiguousarray(ids[::-1, ::-1])
    other.reserve(length + _ROOM)
    logits = []
    for end in range(length - num_tokens, length + 1):
        logits.append(decoding.feed(ids[:, decoding.num_tokens : end], mask[:, :end]))
        other.feed(others[:, other.num_tokens : end], np.ones_like(mask[:, :end]))
    for name, buffer in ({} if decoding.buffers is None else decoding.buffers.arrays()).items():
        beyond = buffer[:, :, length:].astype(np.float32)
        if not np.array_equal(beyond, np.full_like(beyond, fill), equal_nan=True):
            raise ExportError(f"cells of {name} beyond the last token were written")
    return {runtime.spec.main_output: np.stack(logits, axis=1), **decoding.caches(mask)}


class ArtifactProcess:
    """A fresh process that has loaded a bundle. Pass an input with `start`, do something else, then get its `result`.

    Use it as a context manager; the process ends with the block.

    Args:
        bundle: directory of the bundle.
        options: options for running it.
    """

    def __init__(self, bundle: Path, options: RunOptions) -> None:
        given = json.dumps(asdict(options), default=str)  # for the path of the key
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
        """Backend that runs the artifact; waits until it is loaded.

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
        """Pass an input without waiting for the output."""
        self._ask({}, inputs)

    def _ask(self, header: Mapping[str, Any], inputs: Mapping[str, Array]) -> None:
        self.backend  # noqa: B018 - the first answer is that the artifact is loaded
        with suppress(BrokenPipeError):  # `result` reports why the process ended
            _send(self._process.stdin, header, inputs)

    def result(self) -> dict[str, Array]:
        """Outputs by name for the input that `start` passed.

        Raises:
            ExportError: the artifact did not run.
        """
        _, outputs = self._answer()
        return outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an input and wait for its outputs by name.

        Raises:
            ExportError: the artifact did not run.
        """
        self.start(inputs)
        return self.result()

    def decode(self, inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
        """See `Artifact.decode`; raises ExportError if the artifact did not run."""
        self._ask({"decode": num_tokens}, inputs)
        return self.result()

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        """See `Artifact.generate`; raises ExportError if the artifact did not run."""
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
    # Frames go to a copy of standard output, so that C code that prints to descriptor 1 cannot write between them.
    stdin, stdout = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Imported only after printing is redirected.
    from diffdeploy.runtime import open_runtime

    try:
        # This process mostly waits while the other one computes yardsticks, which need the memory.
        runtime = open_runtime(bundle, replace(RunOptions(**json.loads(options)), keep_memory=False))
    except DiffDeployError as error:
        _send(stdout, {"error": str(error)}, {})
        return error.exit_code
    _send(stdout, {"backend": runtime.description}, {})
    while _answer_next(runtime, stdin, stdout):
        pass
    return 0


def _answer_next(runtime: "Runtime", stdin: BufferedIOBase, stdout: IO[bytes]) -> bool:
    """Answer one input; false if there are no more. The other process gets the memory of arrays as soon as possible."""
    frame = _receive(stdin)
    if frame is None:
        return False
    header: dict[str, str] = {}
    try:
        outputs = answered(runtime, *frame)
    except Exception as error:  # noqa: BLE001 - any error that a backend raises is the finding
        # One input that fails says nothing about the next.
        header, outputs = {"error": f"{type(error).__name__}: {error}"}, {}
    del frame  # its caches are as large as those that are sent
    return_freed_memory()
    _send(stdout, header, outputs)
    outputs.clear()
    return_freed_memory()
    return True


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
