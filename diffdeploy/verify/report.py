"""The result of a verification: one record per case and per structural check, and the verdict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from diffdeploy.budgets import Budget
from diffdeploy.bundle import REPORT, Bundle, Environment, Manifest
from diffdeploy.errors import InputError, VerificationError
from diffdeploy.formats import ArtifactFacts, Check
from diffdeploy.graphs import DType
from diffdeploy.locate import Finding
from diffdeploy.records import Record, Rounded
from diffdeploy.verify.coverage import Coverage
from diffdeploy.verify.loss import Loss

__all__ = [
    "CaseReport",
    "OutputReport",
    "RejectedError",
    "Report",
    "files_judged",
    "read_report",
]


class OutputReport(Record):
    """One output of one case: all figures needed to judge it, and the verdict.

    Attributes:
        output: name of the output.
        passed: true if the error is within its budget.
        budget_used: error divided by allowed error, root mean square or maximum, whichever is larger; ``None`` if
            no error was measured.
        smallest_k: the smallest `Budget.k` with which it would still pass; ``None`` if none is enough.
        rmse: root mean square error of the artifact against fp64.
        eager_rmse: root mean square error of the eager block in the artifact's dtype.
        storage_rmse: root mean square error of the formula if both streams are stored in the dtype; see
            `exact_and_stored`.
        activation_rmse: allowance for activations that are quantised, see `ActivationShare`; 0 for others.
        allowed_rmse: largest allowed ``rmse``.
        max_error: largest absolute error of the artifact against fp64.
        eager_max_error: largest absolute error of the eager block.
        storage_max_error: largest absolute error of the formula with stored streams.
        activation_max_error: allowance for activations that are quantised.
        allowed_max_error: largest allowed ``max_error``.
        exact_rms: root mean square of the exact result, where it is finite.
        exact_max: largest magnitude of the exact result, where it is finite.
        worst_index: index of ``max_error``.
        num_unjudged: number of elements that are not judged, since eager overflows on the way to them; this occurs only
            for extreme inputs without NaN or infinity.
        reason: reason for a failure.
    """

    output: str
    passed: bool
    budget_used: Rounded | None = None
    smallest_k: Rounded | None = None
    rmse: Rounded | None = None
    eager_rmse: Rounded | None = None
    storage_rmse: Rounded = 0.0
    activation_rmse: Rounded = 0.0
    allowed_rmse: Rounded | None = None
    max_error: Rounded | None = None
    eager_max_error: Rounded | None = None
    storage_max_error: Rounded = 0.0
    activation_max_error: Rounded = 0.0
    allowed_max_error: Rounded | None = None
    exact_rms: Rounded | None = None
    exact_max: Rounded | None = None
    worst_index: list[int] | None = None
    num_unjudged: int = 0
    reason: str | None = None

    @classmethod
    def failed(cls, output: str, reason: str) -> Self:
        """Create an output without figures."""
        return cls(output=output, passed=False, reason=reason)

    @property
    def failure(self) -> str:
        """Description of what is wrong, where and by how much."""
        if self.budget_used is None:
            return f"{self.output}: {self.reason}"
        times = f"{self.budget_used:,.3g} times the allowed one"
        return f"the error of {self.output} is {times}, largest at {self.worst_index}"

    @property
    def severity(self) -> float:
        """Sort key for finding the worst output: the budget used, or infinity if no error was measured."""
        return float("inf") if self.budget_used is None else self.budget_used


class CaseReport(OutputReport):
    """One case. The inherited fields are those of its worst output, which used the largest share of its budget.

    Attributes:
        id: name of the case.
        group: purpose of the case, in a few words shared with similar cases.
        outputs: reports on all outputs.
    """

    id: str
    group: str
    outputs: list[OutputReport]

    @classmethod
    def of(cls, case_id: str, group: str, outputs: Sequence[OutputReport]) -> Self:
        """Create a case with these outputs, at least one."""
        # In tables, the output that is nearest to failing represents the case.
        worst = max(outputs, key=lambda report: report.severity)
        return cls(id=case_id, group=group, outputs=list(outputs), **{name: getattr(worst, name) for name in _FIGURES})

    @classmethod
    def did_not_run(cls, case_id: str, group: str, reason: str) -> Self:
        """Create a case without outputs."""
        return cls.of(case_id, group, [OutputReport.failed("output", f"the artifact did not run: {reason}")])


# Copied from an output, since a case has all the fields of one.
_FIGURES = tuple(OutputReport.model_fields)


class Report(Record):
    """The verdict on one artifact, with all the evidence for it.

    Attributes:
        schema_version: version of this record.
        format: deployment format.
        dtype: dtype of the graph, which determines the budget.
        backend: backend that ran the artifact.
        seed: random seed for the cases.
        selection: selection of cases: ``full``, ``quick``, a number, ``user`` or ``golden``.
        budget: budget by which the cases are judged.
        files: sha256 of the files of the bundle that the verdict is about, by name; reports are not included.
        environment: versions of the software that verified it.
        graph: facts read from the artifact.
        contract: checks of its structure and properties.
        cases: numerical comparisons.
        coverage: parts of each declared range that the cases tried.
        greedy_tokens_checked: number of generated tokens whose exact margin was large enough to judge them; ``None`` if
            nothing was generated.
        guilty: stage at which a failed artifact first deviates.
        loss: loss that quantisation caused, measured when the bundle was made and not part of the verdict; ``None`` if
            it was not measured.
    """

    schema_version: Literal[2] = 2
    format: str
    dtype: DType
    backend: str
    seed: int
    selection: str
    budget: Budget
    files: dict[str, str]
    environment: Environment
    graph: ArtifactFacts
    contract: list[Check]
    cases: list[CaseReport]
    coverage: list[Coverage] = Field(default_factory=list)
    greedy_tokens_checked: int | None = None
    guilty: Finding | None = None
    loss: Loss | None = None

    @property
    def passed(self) -> bool:
        """True if every check and every case passed, and there was at least one of each."""
        return (
            bool(self.contract)
            and bool(self.cases)
            and all(check.passed for check in self.contract)
            and all(case.passed for case in self.cases)
        )

    @property
    def worst(self) -> CaseReport | None:
        """A failed case without figures if there is one, else the case that used the largest share of its budget.

        ``None`` if there are no cases.
        """
        return max(self.cases, key=lambda case: case.severity, default=None)

    @property
    def untried(self) -> str | None:
        """Parts of the declared ranges that no case tried, and unjudged elements; ``None`` if there are neither."""
        clauses = [text for part in self.coverage if (text := part.untried_text) is not None]
        if overflowed := sum(any(output.num_unjudged for output in case.outputs) for case in self.cases):
            clauses.append(f"elements of {overflowed} cases for which eager returns NaN or infinity")
        return ", ".join(clauses) or None

    def with_check(self, check: Check) -> "Report":
        """The same report with one more structural check."""
        return self.model_copy(update={"contract": [*self.contract, check]})

    def require_of(self, bundle: Bundle, source: Path) -> None:
        """Check that the report belongs to a bundle.

        Args:
            bundle: an opened bundle.
            source: path of the report, for the error.

        Raises:
            InputError: the report belongs to another bundle.
        """
        files = files_judged(bundle.manifest)
        # The difference is symmetric, so that a file that only one of them has is found, too.
        if differing := sorted(name for name, _ in self.files.items() ^ files.items()):
            raise InputError(
                f"{source} is not the report of {bundle.path}: {', '.join(dict.fromkeys(differing))} differ; give the "
                "report of this bundle, or omit the bundle"
            )

    def first_failure(self) -> str | None:
        """One clause that says what failed first, where, and by how much; ``None`` if nothing did."""
        clauses = [f"{check.name}: {check.detail}" for check in self.contract if not check.passed][:1]
        failed = [case for case in self.cases if not case.passed]
        if failed:
            first = failed[0]
            clauses.append(f"{len(failed)} of {len(self.cases)} cases failed, first {first.id}: {first.failure}")
        if not self.cases and not clauses:
            clauses.append("no case was run")
        if self.guilty is not None and self.guilty.stage is not None:
            clauses.append(f"first deviating stage: {self.guilty.stage}")
        return "; ".join(clauses) or None

    def to_bytes(self) -> bytes:
        """Serialise to JSON; equal content gives identical bytes."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        """Invert `to_bytes`.

        Args:
            data: content of the file.
            name: name of the file, for the error.

        Raises:
            InputError: the data is not a report, or comes from a version with other fields.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InputError(
                f"{name} is not a report of this version of diffdeploy; accepted: the verification.json of a bundle, "
                "or the output of diffdeploy verify --save-report"
            ) from error


def files_judged(manifest: Manifest) -> dict[str, str]:
    """Digests by name of the files that a verdict on a bundle is about: all but an earlier report."""
    return {name: digest.sha256 for name, digest in manifest.files.items() if name != REPORT}


def read_report(path: Path) -> Report:
    """Read the report in a file.

    Raises:
        InputError: the file is not a report, or comes from a version with other fields.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give the verification.json of a bundle, or the output of "
            "diffdeploy verify --save-report"
        ) from error
    return Report.from_bytes(data, str(path))


class RejectedError(VerificationError):
    """The artifact of an export failed verification; only this report was kept."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
