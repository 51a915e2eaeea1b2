"""What ``manifest.json`` holds, and its one byte-exact form."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffdeploy import __version__
from diffdeploy.config import AnyConfig
from diffdeploy.errors import IntegrityError
from diffdeploy.graphs import GraphSpec

__all__ = ["Environment", "FileDigest", "Manifest", "Provenance"]

SCHEMA_VERSION: Literal[1] = 1
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "flash-attn", "numpy")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Frozen):
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


class Provenance(_Frozen):
    """Where the weights come from.

    Attributes:
        files: the files that were read, by name.
        layout: of the checkpoint.
        layer: of the block in it, if its keys have an index.
        keys: the keys that were read.
        options: what was given to read it.
    """

    files: dict[str, FileDigest]
    layout: str
    layer: int | None
    keys: list[str]
    options: dict[str, int | float | str]


class Environment(_Frozen):
    """Versions of what made the bundle."""

    diffdeploy: str
    python: str
    machine: str
    packages: dict[str, str]

    @classmethod
    def current(cls) -> Self:
        """Of this process."""
        packages = {}
        for name in _PACKAGES:
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                continue
        return cls(
            diffdeploy=__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            packages=packages,
        )


class Manifest(_Frozen):
    """Everything that is known of a bundle.

    Attributes:
        schema_version: of this file.
        format: deployment format.
        config: canonical config of the block.
        graph: interface of the graph.
        options: what the exporter was asked for and depends on (opset, implementation, seed).
        made_for: what of a machine the artifact needs, for compiled ones; see `diffdeploy.runtime.machine`.
        verified: whether verification accepted it when it was made.
        environment: versions of what made it.
        provenance: checkpoint it came from.
        files: digest of every other file, by its relative path.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    format: str
    config: Annotated[AnyConfig, Field(discriminator="version")]
    graph: GraphSpec
    options: dict[str, int | str]
    made_for: dict[str, str] = {}
    verified: bool
    environment: Environment
    provenance: Provenance
    files: dict[str, FileDigest]

    def to_bytes(self) -> bytes:
        """JSON with a digest of itself, always the same bytes for the same content."""
        fields = self.model_dump(mode="json")
        body = _render(fields)
        return _render({**fields, "manifest_sha256": hashlib.sha256(body).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`.

        Raises:
            IntegrityError: not a manifest, of another schema, or with a changed byte.
        """
        try:
            fields = json.loads(data)
            given = fields.pop("schema_version", None)
            if given != SCHEMA_VERSION:
                raise IntegrityError(f"manifest.json has schema_version {given!r}; accepted is {SCHEMA_VERSION}")
            fields.pop("manifest_sha256", None)
            manifest = cls.model_validate(fields)
        except (ValueError, AttributeError, ValidationError) as error:
            raise IntegrityError("manifest.json is damaged: it is not a manifest of diffdeploy") from error
        if manifest.to_bytes() != data:
            raise IntegrityError("manifest.json is damaged: its content does not match its own digest")
        return manifest


def _render(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
