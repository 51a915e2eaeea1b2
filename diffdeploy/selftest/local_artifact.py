"""An artifact that runs in this process, for many trials in a row: separate processes would take minutes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from diffdeploy.arrays import Array
from diffdeploy.errors import ExportError
from diffdeploy.formats import RunOptions
from diffdeploy.runtime import Runtime, open_runtime
from diffdeploy.selftest.fault import Wrap
from diffdeploy.selftest.stand_in import StandIn
from diffdeploy.verify.worker import answered

__all__ = ["LocalArtifact"]


class LocalArtifact:
    """Substitute for `diffdeploy.verify.worker.ArtifactProcess`.

    Args:
        bundle: directory of the bundle.
        options: options for running it.
        wrap: wrapper around the runtime's calls.
        stand_in: substitute for the runtime.
    """

    def __init__(
        self, bundle: Path, options: RunOptions, wrap: Wrap | None = None, stand_in: type[StandIn] | None = None
    ) -> None:
        self._bundle, self._options, self._wrap, self._stand_in = bundle, options, wrap, stand_in
        self._runtime: Runtime | None = None
        self._call: Callable[[dict[str, Array]], dict[str, Array]]
        self._started: Mapping[str, Array] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._runtime is not None:
            self._runtime.close()

    @property
    def backend(self) -> str:
        """Backend that runs the artifact, which is loaded first.

        Raises:
            ExportError: the runtime cannot load the bundle.
        """
        if self._runtime is None:
            runtime = open_runtime(self._bundle, self._options)
            if self._stand_in is not None:
                runtime = self._stand_in(runtime)

            def call(inputs: dict[str, Array]) -> dict[str, Array]:
                return runtime(**inputs)

            self._runtime, self._call = runtime, call if self._wrap is None else self._wrap(call)
        return self._runtime.description

    def start(self, inputs: Mapping[str, Array]) -> None:
        """Store an input, which `result` runs."""
        self.backend  # noqa: B018 - loads the artifact
        self._started = inputs

    def result(self) -> dict[str, Array]:
        """Run the input and return its outputs by name.

        Raises:
            ExportError: the artifact did not run.
        """
        try:
            return self._call(dict(self._started))
        except Exception as error:  # any error that a backend raises is the finding, as in a separate process
            raise ExportError(f"{type(error).__name__}: {error}") from error

    def decode(self, inputs: Mapping[str, Array], num_tokens: int) -> dict[str, Array]:
        """See `Artifact.decode`; raises ExportError if the artifact did not run."""
        return self._answered({"decode": num_tokens}, inputs)

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        """See `Artifact.generate`; raises ExportError if the artifact did not run."""
        return self._answered({"generate": num_tokens}, inputs)["tokens"]

    def _answered(self, header: Mapping[str, int], inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.backend  # noqa: B018 - loads the artifact
        assert self._runtime is not None
        try:
            return answered(self._runtime, header, dict(inputs))
        except Exception as error:  # any error that a backend raises is the finding, as in a separate process
            raise ExportError(f"{type(error).__name__}: {error}") from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an input and return its outputs by name.

        Raises:
            ExportError: the artifact did not run.
        """
        self.start(inputs)
        return self.result()
