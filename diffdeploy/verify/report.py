"""What a verification says: one record per case and per structural check, and the verdict."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict

from diffdeploy.errors import VerificationError

__all__ = ["CaseReport", "Check", "GraphFacts", "RejectedError", "Report"]

# Four digits are what a person reads; more would let a report differ where nothing that matters does.
Rounded = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CaseReport(_Frozen):
    """One case.

    Attributes:
        id: name of the case.
        output: the output that the numbers are of: the one that used most of its budget.
        passed: whether every output is within its budget.
        budget_used: error over allowed error, the larger of the two measures; ``None`` where there is no number.
        rmse: root mean square of the artifact's error against fp64.
        eager_rmse: the same of the eager block in the artifact's dtype.
        max_error: largest absolute error of the artifact against fp64.
        eager_max_error: the same of the eager block.
        worst_index: where ``max_error`` is.
        reason: why it failed.
    """

    id: str
    output: str
    passed: bool
    budget_used: Rounded | None = None
    rmse: Rounded | None = None
    eager_rmse: Rounded | None = None
    max_error: Rounded | None = None
    eager_max_error: Rounded | None = None
    worst_index: list[int] | None = None
    reason: str | None = None

    @classmethod
    def failed(cls, case_id: str, reason: str, output: str = "output") -> Self:
        """A case that has no number to show."""
        return cls(id=case_id, output=output, passed=False, reason=reason)

    @property
    def severity(self) -> float:
        """For finding the worst: the budget used, infinite where there is no number."""
        return float("inf") if self.budget_used is None else self.budget_used


class Check(_Frozen):
    """One structural check of the artifact."""

    name: str
    passed: bool
    detail: str


class GraphFacts(_Frozen):
    """What the artifact itself says it is."""

    variant: str
    attention_ops: int
    opset: int | None
    inputs: list[str]
    outputs: list[str]


class Report(_Frozen):
    """The verdict on one artifact, with everything it rests on.

    Attributes:
        schema_version: of this record.
        format: deployment format.
        backend: what ran the artifact.
        seed: of the cases.
        graph: facts read from the artifact.
        contract: structural checks.
        cases: numerical comparisons.
    """

    schema_version: Literal[1] = 1
    format: str
    backend: str
    seed: int
    graph: GraphFacts
    contract: list[Check]
    cases: list[CaseReport]

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

    def with_check(self, check: Check) -> "Report":
        """The same report with one more structural check."""
        return self.model_copy(update={"contract": [*self.contract, check]})

    def first_failure(self) -> str | None:
        """One clause that says what failed first; ``None`` when nothing did."""
        for check in self.contract:
            if not check.passed:
                return f"{check.name}: {check.detail}"
        failed = [case for case in self.cases if not case.passed]
        if not failed:
            return None if self.cases else "no case was run"
        first = failed[0]
        share = "" if first.budget_used is None else f" ({first.budget_used:.3g} times what is allowed)"
        where = "" if first.output == "output" else f", {first.output}"
        return f"{len(failed)} of {len(self.cases)} cases failed, first {first.id}{where}: {first.reason}{share}"

    def to_bytes(self) -> bytes:
        """JSON, always the same bytes for the same content."""
        return (self.model_dump_json(indent=2) + "\n").encode()


class RejectedError(VerificationError):
    """An export whose artifact did not pass; nothing was kept but this report."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
