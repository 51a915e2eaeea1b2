"""What ``manifest.json`` holds, and its one byte-exact form."""

import hashlib
import json
import platform
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from diffdeploy import __version__
from diffdeploy.bundle.migration import migrated
from diffdeploy.bundle.quantised import Quantisation
from diffdeploy.config import AnyConfig, AnyModel, DecoderConfig
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.graphs import GraphSpec
from diffdeploy.records import Record
from diffdeploy.versions import installed_versions

__all__ = ["Environment", "ExportRecord", "FileDigest", "Manifest", "Provenance"]

SCHEMA_VERSION: Literal[3] = 3

# Short, since Python refuses to read numbers of thousands of digits.
Release = Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9}){0,3}$")]


class FileDigest(Record):
    """Size in bytes and sha256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Provenance(Record):
    """Where the weights come from.

    Attributes:
        files: the files that were read, by name.
        layout: of the checkpoint.
        layer: of the block in it, if its keys have an index.
        keys: the keys that were read.
        options: what was given to read it.
        defaults: fields that config.json leaves to the source's own config class, with the value and the class.
    """

    files: dict[str, FileDigest]
    layout: str
    layer: int | None
    keys: list[str]
    options: dict[str, bool | int | float | str]
    defaults: dict[str, str] = Field(default_factory=dict)


class Environment(Record):
    """Versions of what made the bundle."""

    diffdeploy: str
    python: str
    machine: str
    packages: dict[str, str]

    @classmethod
    def current(cls, distributions: Iterable[str]) -> Self:
        """The environment of this process.

        Args:
            distributions: packages whose versions count; those that are not installed are left out.
        """
        return cls(
            diffdeploy=__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            packages=installed_versions(distributions),
        )


class ExportRecord(Record):
    """What the exporter was asked for, as far as the artifact depends on it.

    Attributes:
        attention_impl: implementation of the operator that the artifact is written with.
        seed: random seed for the verification inputs and the golden vectors.
        device: ``cpu`` or ``cuda``, the kind of device that the artifact is bound to; ``None`` for any.
        opset: ONNX operator set.
        flavor: which of a format's ways to write the block down was taken.
        quantisation: of the matrices of a model; ``None`` where all weights are in the dtype of the graph.
    """

    attention_impl: str
    seed: int
    device: Literal["cpu", "cuda"] | None = None
    opset: int | None = None
    flavor: str | None = None
    quantisation: Quantisation | None = None

    def plain(self) -> dict[str, bool | int | str]:
        """All of it but `quantisation`, which is a record of its own."""
        return self.model_dump(exclude={"quantisation"})

    @model_serializer(mode="wrap")
    def _what_applies(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields that this artifact has."""
        # Absent, not null: a bundle says nothing of options that its format does not have.
        return {name: value for name, value in serialise(self).items() if value is not None}


class Manifest(Record):
    """Everything that is known of a bundle.

    Attributes:
        schema_version: of this file.
        format: deployment format.
        config: canonical config of the block, or of the decoder.
        graph: interface of the graph.
        options: what the exporter was asked for.
        made_for: what of a machine the artifact needs, for compiled ones; see `diffdeploy.runtime.machine`.
        requires: least version of each package that computes the artifact rightly, by import name; ``None`` where the
            manifest is older than this field. See `diffdeploy.runtime.least_versions`.
        verified: whether verification accepted it when it was made.
        environment: versions of what made it.
        provenance: checkpoint it came from.
        files: digest of every other file, by its relative path.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
    format: str
    config: Annotated[AnyModel, Field(discriminator="version")]
    graph: GraphSpec
    options: ExportRecord
    made_for: dict[str, str] = Field(default_factory=dict)
    requires: dict[str, Release] | None = None
    verified: bool
    environment: Environment
    provenance: Provenance
    files: dict[str, FileDigest]

    @property
    def block(self) -> AnyConfig:
        """The config of a bundle that holds a block.

        Raises:
            InputError: it holds a whole model.
        """
        if isinstance(self.config, DecoderConfig):
            raise InputError(
                "the bundle holds a whole model, and what was asked for is of single blocks; export one with --layer"
            )
        return self.config

    def to_bytes(self) -> bytes:
        """JSON with a digest of itself, always the same bytes for the same content."""
        fields = self.model_dump(mode="json")
        return _render({**fields, "manifest_sha256": _digest(fields)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`.

        Raises:
            IntegrityError: not a manifest, of another schema, or with a changed byte.
        """
        try:
            fields = json.loads(data)
            # A digest of the rest, since none can be of itself.
            digest = fields.pop("manifest_sha256", None)
            # Over the content as it was written, since a manifest of an earlier schema renders otherwise today.
            intact = _render({**fields, "manifest_sha256": digest}) == data
            # Strictly: a number in quotes is damage, too.
            whole = json.dumps(migrated(fields)) if intact and digest == _digest(fields) else None
            manifest = None if whole is None else cls.model_validate_json(whole, strict=True)
        # JSON may nest without end, and need not be an object.
        except (ValueError, AttributeError, TypeError, RecursionError, ValidationError) as error:
            raise IntegrityError("manifest.json is damaged: it is not a manifest of diffdeploy") from error
        if manifest is None:
            raise IntegrityError("manifest.json is damaged: its content does not match its own digest")
        return manifest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_render(fields)).hexdigest()


def _render(fields: dict[str, Any]) -> bytes:
    # NaN is not JSON: other readers would refuse the file.
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
