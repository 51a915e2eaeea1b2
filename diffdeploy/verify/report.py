"""What a verification says: one record per case and per structural check, and the verdict."""

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
    """One output of one case: all that judging it needs, and the verdict.

    Attributes:
        output: its name.
        passed: whether it is within its budget.
        budget_used: error over allowed error, the larger of the two measures; ``None`` where there is no number.
        smallest_k: the smallest `Budget.k` that it would still pass with; ``None`` where none is enough.
        rmse: root mean square of the artifact's error against fp64.
        eager_rmse: the same of the eager block in the artifact's dtype.
        storage_rmse: the same of the formula, when both streams are stored in the dtype; see `exact_and_stored`.
        allowed_rmse: the most that ``rmse`` may be.
        max_error: largest absolute error of the artifact against fp64.
        eager_max_error: the same of the eager block.
        storage_max_error: the same of the formula with stored streams.
        allowed_max_error: the most that ``max_error`` may be.
        exact_rms: root mean square of the exact result, where it is finite.
        exact_max: largest magnitude of the exact result, where it is finite.
        worst_index: where ``max_error`` is.
        num_unjudged: elements of which nothing is asked, since eager overflows on the way to them; on extreme inputs
            alone, and not on those that hold NaN or infinity.
        reason: why it failed.
    """

    output: str
    passed: bool
    budget_used: Rounded | None = None
    smallest_k: Rounded | None = None
    rmse: Rounded | None = None
    eager_rmse: Rounded | None = None
    storage_rmse: Rounded = 0.0
    allowed_rmse: Rounded | None = None
    max_error: Rounded | None = None
    eager_max_error: Rounded | None = None
    storage_max_error: Rounded = 0.0
    allowed_max_error: Rounded | None = None
    exact_rms: Rounded | None = None
    exact_max: Rounded | None = None
    worst_index: list[int] | None = None
    num_unjudged: int = 0
    reason: str | None = None

    @classmethod
    def failed(cls, output: str, reason: str) -> Self:
        """An output that has no number to show."""
        return cls(output=output, passed=False, reason=reason)

    @property
    def failure(self) -> str:
        """What is wrong with it, where and by how much."""
        if self.budget_used is None:
            return f"{self.output}: {self.reason}"
        times = f"{self.budget_used:,.3g} times what is allowed"
        return f"the error of {self.output} is {times}, largest at {self.worst_index}"

    @property
    def severity(self) -> float:
        """For finding the worst: the budget used, infinite where there is no number."""
        return float("inf") if self.budget_used is None else self.budget_used


class CaseReport(OutputReport):
    """One case. What it inherits is of its worst output: the one that used most of its budget.

    Attributes:
        id: name of the case.
        group: what the case tries, in a few words that cases share.
        outputs: every output.
    """

    id: str
    group: str
    outputs: list[OutputReport]

    @classmethod
    def of(cls, case_id: str, group: str, outputs: Sequence[OutputReport]) -> Self:
        """A case with these outputs, at least one."""
        # The one that is nearest to failing stands for the case in tables.
        worst = max(outputs, key=lambda report: report.severity)
        return cls(id=case_id, group=group, outputs=list(outputs), **{name: getattr(worst, name) for name in _FIGURES})

    @classmethod
    def did_not_run(cls, case_id: str, group: str, reason: str) -> Self:
        """A case without outputs."""
        return cls.of(case_id, group, [OutputReport.failed("output", f"the artifact did not run: {reason}")])


# Taken from outputs, since a case has the fields of one and more.
_FIGURES = tuple(OutputReport.model_fields)


class Report(Record):
    """The verdict on one artifact, with everything it rests on.

    Attributes:
        schema_version: of this record.
        format: deployment format.
        dtype: of the graph, which sets the budget.
        backend: what ran the artifact.
        seed: of the cases.
        selection: which cases: ``full``, ``quick``, a number, ``user`` or ``golden``.
        budget: what the cases are judged by.
        files: sha256 of the files of the bundle, by name, but for reports: whose verdict this is.
        environment: versions of what verified it.
        graph: facts read from the artifact.
        contract: checks of its structure and properties.
        cases: numerical comparisons.
        coverage: what the cases tried of each declared range.
        greedy_tokens_checked: generated tokens of which the exact margin tells whether they are right; ``None`` where
            nothing was generated.
        guilty: where an artifact that failed first deviates.
        loss: what quantised weights lost against the original ones when the bundle was made, which is no part of the
            verdict; ``None`` where it was not measured.
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
        """Whether every check and every case passed, and there was at least one of each."""
        return (
            bool(self.contract)
            and bool(self.cases)
            and all(check.passed for check in self.contract)
            and all(case.passed for case in self.cases)
        )

    @property
    def worst(self) -> CaseReport | None:
        """The failed case without a number, else the one that used most of its budget; ``None`` without cases."""
        return max(self.cases, key=lambda case: case.severity, default=None)

    @property
    def untried(self) -> str | None:
        """The parts of the declared ranges that no case was run on, and what was run but not judged; ``None``: none."""
        clauses = [text for part in self.coverage if (text := part.untried_text) is not None]
        if overflowed := sum(any(output.num_unjudged for output in case.outputs) for case in self.cases):
            clauses.append(f"elements of {overflowed} cases on which eager gives NaN or infinity")
        return ", ".join(clauses) or None

    def with_check(self, check: Check) -> "Report":
        """The same report with one more structural check."""
        return self.model_copy(update={"contract": [*self.contract, check]})

    def require_of(self, bundle: Bundle, source: Path) -> None:
        """See that the report is of a bundle.

        Args:
            bundle: an opened bundle.
            source: where the report came from, for the error.

        Raises:
            InputError: it is of another.
        """
        files = files_judged(bundle.manifest)
        # Symmetric, so that a file that only one of them has is found as well.
        if differing := sorted(name for name, _ in self.files.items() ^ files.items()):
            raise InputError(
                f"{source} is the report of another bundle than {bundle.path}: {', '.join(dict.fromkeys(differing))} "
                "differ; give the report of this one, or leave the bundle out"
            )

    def first_failure(self) -> str | None:
        """One clause that says what failed first, where, and by how much; ``None`` when nothing did."""
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
        """JSON, always the same bytes for the same content."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        """Inverse of `to_bytes`.

        Args:
            data: of the file.
            name: of the file, for the error.

        Raises:
            InputError: not a report, or one of a version with other fields.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InputError(
                f"{name} is not a report of this version of diffdeploy; accepted is the verification.json of a bundle, "
                "or what diffdeploy verify --save-report wrote"
            ) from error


def files_judged(manifest: Manifest) -> dict[str, str]:
    """Digests of the files that a verdict on a bundle is about, by name: of all but an earlier report."""
    return {name: digest.sha256 for name, digest in manifest.files.items() if name != REPORT}


def read_report(path: Path) -> Report:
    """The report in a file.

    Raises:
        InputError: there is none, or one of a version with other fields.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give the verification.json of a bundle, or what diffdeploy "
            "verify --save-report wrote"
        ) from error
    return Report.from_bytes(data, str(path))


class RejectedError(VerificationError):
    """An export whose artifact did not pass; nothing was kept but this report."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
