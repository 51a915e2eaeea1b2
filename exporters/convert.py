"""Conversion to a checkpoint of another code base, which is read back and compared before it is moved into place."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from diffdeploy.arrays import ArrayView
from diffdeploy.bundle import Environment, Provenance
from diffdeploy.checkpoints import ModelCheckpoint, diffllama_config, read_model, write_diffllama
from diffdeploy.errors import VerificationError
from diffdeploy.exporters.export import provenance_of
from diffdeploy.graphs import DType, GraphSpec, graph_spec
from diffdeploy.records import Record
from diffdeploy.staging import staged_directory
from diffdeploy.verify import CaseReport
from diffdeploy.verify.cases import Case
from diffdeploy.verify.decoder import exact_outputs
from diffdeploy.verify.eager import run_arrays
from diffdeploy.verify.metrics import Yardstick, measure

__all__ = ["RECORD", "Conversion", "ConversionRecord", "Target", "convert_model"]

Target = Literal["diffllama"]

RECORD = "conversion.json"
# Number of positions of the longest case; every weight except rows of the embedding affects each of them.
_LONGEST = 33


class ConversionRecord(Record):
    """Content of ``conversion.json``: the origin of the weights, and the error of the written weights.

    Attributes:
        schema_version: version of the schema of this file.
        target: code base of the written checkpoint.
        dtype: dtype of the weights, which determines the budget of the comparison.
        provenance: checkpoint that was read.
        environment: versions of the software that wrote it.
        cases: comparisons of the logits of the written and the read model, both in fp64.
    """

    schema_version: Literal[1] = 1
    target: Target
    dtype: DType
    provenance: Provenance
    environment: Environment
    cases: list[CaseReport]

    @property
    def worst(self) -> CaseReport:
        """The case that used the largest share of its budget."""
        return max(self.cases, key=lambda case: case.severity)


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: its location, the files with weights, and the record next to them."""

    path: Path
    weight_files: list[str]
    record: ConversionRecord


def convert_model(
    found: ModelCheckpoint,
    output: Path,
    *,
    target: Target = "diffllama",
    force: bool = False,
    phase: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Write a decoder as a checkpoint of another code base, and move it to ``output`` if its logits are the same.

    Args:
        found: the decoder, from `diffdeploy.read_model`.
        output: directory to create, along with its parents.
        target: the code base.
        force: true to replace an earlier conversion at ``output``.
        phase: callback that receives a few words when a phase begins.

    Raises:
        InputError: the code base cannot represent the model, or ``output`` is not acceptable.
        UnavailableError: the disk is full.
        VerificationError: the written checkpoint computes something else.
    """
    assert target in get_args(Target)
    wanted = diffllama_config(found.config)  # raises before anything is written
    with staged_directory(output, marker=RECORD, what="conversion", force=force) as staging:
        phase("writing")
        weight_files = write_diffllama(found, staging)
        phase("comparing logits")
        written = read_model(staging)
        if written.config != wanted:
            raise VerificationError("the written checkpoint, when read back, has a different config; nothing was kept")
        dtype = _dtype(found)
        cases = _compare(found, written, dtype)
        if failed := next((case for case in cases if not case.passed), None):
            raise VerificationError(
                f"the written checkpoint computes different logits, and was not kept: {failed.id}: {failed.failure}"
            )
        record = ConversionRecord(
            target=target,
            dtype=dtype,
            provenance=provenance_of(found),
            environment=Environment.current(("torch", "safetensors", "numpy")),
            cases=cases,
        )
        (staging / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Conversion(output, weight_files, record)


def _dtype(found: ModelCheckpoint) -> DType:
    """Dtype whose rounding the comparison allows: that of the weights, or float32 for wider ones."""
    name = str(found.weights["embedding.weight"].dtype).removeprefix("torch.")
    return next((dtype for dtype in get_args(DType) if dtype == name), "float32")


def _compare(found: ModelCheckpoint, written: ModelCheckpoint, dtype: DType) -> list[CaseReport]:
    """Compare the logits of both in fp64; the allowed difference follows from the rounding error of ``found``."""
    import torch

    from diffdeploy.modules import DiffTransformer

    positions = written.max_positions
    assert positions is not None
    spec = graph_spec("model", found.config, dtype=dtype, max_batch_size=2, max_sequence_length=positions)
    model = DiffTransformer.from_weights(
        found.config, found.weights, impl="naive", max_positions=positions, dtype=getattr(torch, dtype)
    )
    eager, reports = run_arrays(model), []
    for case in _cases(spec):
        inputs = case.inputs(spec)
        exact, actual = (
            exact_outputs(each.config, ArrayView(each.weights), inputs, spec)[spec.main_output]
            for each in (found, written)
        )
        yardstick = Yardstick(exact, dtype)
        yardstick.add(eager(inputs)[spec.main_output])
        reports.append(CaseReport.of(case.id, case.group, [measure(spec.main_output, actual.astype(dtype), yardstick)]))
    return reports


def _cases(spec: GraphSpec) -> list[Case]:
    """A long case, one with padding, and one whose positions reach the end of the rotary table."""
    longest = min(_LONGEST, spec.axes["sequence_length"].max)
    return [
        Case(batch_size=1, sequence_length=longest, seed=0),
        Case(batch_size=2, sequence_length=min(7, longest), seed=0, mask="left"),
        Case(batch_size=2, sequence_length=min(17, longest), seed=0, positions="drawn"),
    ]
