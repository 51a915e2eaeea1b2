"""The content of ``manifest.json`` and its one byte-exact serialisation."""

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

# Limited, since Python refuses to parse numbers with thousands of digits.
Release = Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9}){0,3}$")]


class FileDigest(Record):
    """Size in bytes and sha256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Provenance(Record):
    """The origin of the weights.

    Attributes:
        files: the files that were read, by name.
        layout: layout of the checkpoint.
        layer: layer of the block in the checkpoint, if its keys have an index.
        keys: the keys that were read.
        options: the options with which the checkpoint was read.
        defaults: fields that config.json leaves to the source's own config class, with the value and the class.
    """

    files: dict[str, FileDigest]
    layout: str
    layer: int | None
    keys: list[str]
    options: dict[str, bool | int | float | str]
    defaults: dict[str, str] = Field(default_factory=dict)


class Environment(Record):
    """Versions of the software that made the bundle."""

    diffdeploy: str
    python: str
    machine: str
    packages: dict[str, str]

    @classmethod
    def current(cls, distributions: Iterable[str]) -> Self:
        """Record the environment of this process.

        Args:
            distributions: packages whose versions are recorded; those that are not installed are omitted.
        """
        return cls(
            diffdeploy=__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            packages=installed_versions(distributions),
        )


class ExportRecord(Record):
    """Export options on which the artifact depends.

    Attributes:
        attention_impl: implementation of the operator in the artifact.
        seed: random seed for the verification inputs and the golden vectors.
        device: ``cpu`` or ``cuda``, the kind of device that the artifact is bound to; ``None`` for any.
        opset: ONNX operator set.
        flavor: variant of the format in which the block is written.
        quantisation: quantisation of the matrices of a model; ``None`` if all weights have the dtype of the graph.
    """

    attention_impl: str
    seed: int
    device: Literal["cpu", "cuda"] | None = None
    opset: int | None = None
    flavor: str | None = None
    quantisation: Quantisation | None = None

    @property
    def quantised_activations(self) -> Quantisation | None:
        """The quantisation, if it includes activations."""
        how = self.quantisation
        return None if how is None or how.activation_blocks is None else how

    def plain(self) -> dict[str, bool | int | str]:
        """All fields except `quantisation`, which is a nested record."""
        return self.model_dump(exclude={"quantisation"})

    @model_serializer(mode="wrap")
    def _what_applies(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise only the fields that apply to this artifact."""
        # Absent rather than null: a manifest does not mention options that its format does not have.
        return {name: value for name, value in serialise(self).items() if value is not None}


class Manifest(Record):
    """The description of a bundle.

    Attributes:
        schema_version: version of the schema of this file.
        format: deployment format.
        config: canonical config of the block or the decoder.
        graph: interface of the graph.
        options: export options.
        made_for: features of the machine that a compiled artifact needs; see `diffdeploy.runtime.machine`.
        requires: oldest version of each package that computes the artifact correctly, by import name; ``None`` if the
            manifest is older than this field. See `diffdeploy.runtime.least_versions`.
        verified: true if the bundle passed verification when it was made.
        environment: versions of the software that made the bundle.
        provenance: checkpoint from which the bundle was made.
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
        """Config of a bundle that holds a single block.

        Raises:
            InputError: the bundle holds a whole model.
        """
        if isinstance(self.config, DecoderConfig):
            raise InputError(
                "the bundle holds a whole model, but this function needs a single block; export one with --layer"
            )
        return self.config

    def to_bytes(self) -> bytes:
        """Serialise to JSON with a digest of itself; equal content gives identical bytes."""
        fields = self.model_dump(mode="json")
        return _render({**fields, "manifest_sha256": _digest(fields)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Invert `to_bytes`.

        Raises:
            IntegrityError: the data is not a manifest, has another schema, or was changed.
        """
        try:
            fields = json.loads(data)
            # The digest covers everything but itself.
            digest = fields.pop("manifest_sha256", None)
            # Computed over the content as written, since a manifest of an earlier schema would be rendered differently
            # today.
            intact = _render({**fields, "manifest_sha256": digest}) == data
            # Strict mode, since a number in quotes is also damage.
            whole = json.dumps(migrated(fields)) if intact and digest == _digest(fields) else None
            manifest = None if whole is None else cls.model_validate_json(whole, strict=True)
        # JSON may be nested too deeply, and need not be an object.
        except (ValueError, AttributeError, TypeError, RecursionError, ValidationError) as error:
            raise IntegrityError("manifest.json is damaged: it is not a manifest of diffdeploy") from error
        if manifest is None:
            raise IntegrityError("manifest.json is damaged: its content does not match its own digest")
        return manifest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_render(fields)).hexdigest()


def _render(fields: dict[str, Any]) -> bytes:
    # NaN is not valid JSON, and other readers would reject the file.
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
