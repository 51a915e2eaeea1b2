"""What a self-test says: one record per fault, and how many were caught and located."""

from typing import Self

from diffdeploy.records import Record
from diffdeploy.selftest.fault import Fault, Place
from diffdeploy.verify.report import Report

__all__ = ["FaultResult", "SelfTest", "Skipped"]


class FaultResult(Record):
    """How one fault fared.

    Attributes:
        name: of the fault.
        place: where it was put in.
        breaks: what is wrong with it.
        caught: whether the verification failed.
        by: the checks that failed, and the first case that did.
        reason: what the first of them says.
        stage: the stage that was named.
        expected_stage: the stage that is wrong; ``None`` for a fault of the whole.
        located: whether they are the same; ``None`` where there is none to name.
        found_by: how the stage was found.
    """

    name: str
    place: Place
    breaks: str
    caught: bool
    by: list[str]
    reason: str | None
    stage: str | None
    expected_stage: str | None
    located: bool | None
    found_by: str | None

    @classmethod
    def of(cls, fault: Fault, report: Report) -> Self:
        """From the report of a verification that ran to its end."""
        failed = [f"check {check.name}" for check in report.contract if not check.passed]
        # Cases end at the first failure, so there is at most one.
        case = next((case for case in report.cases if not case.passed), None)
        guilty = report.guilty
        return cls._made(
            fault,
            caught=not report.passed,
            by=failed if case is None else [*failed, f"case {case.id}"],
            reason=report.first_failure(),
            stage=None if guilty is None else guilty.stage,
            found_by=None if guilty is None else guilty.found_by,
        )

    @classmethod
    def refused(cls, fault: Fault, reason: str) -> Self:
        """The bundle was not even opened."""
        return cls._made(fault, caught=True, by=["opening"], reason=reason, stage=None, found_by=None)

    @classmethod
    def _made(
        cls, fault: Fault, *, caught: bool, by: list[str], reason: str | None, stage: str | None, found_by: str | None
    ) -> Self:
        return cls(
            name=fault.name,
            place=fault.place,
            breaks=fault.breaks,
            caught=caught,
            by=by,
            reason=reason,
            stage=stage,
            expected_stage=fault.stage,
            # Faults of the whole, such as a missing file, have no stage to be right or wrong about.
            located=None if fault.stage is None else stage == fault.stage,
            found_by=found_by,
        )


class Skipped(Record):
    """A fault that could not be put in, and why."""

    name: str
    reason: str


class SelfTest(Record):
    """The verdict on the verification.

    Attributes:
        injected: faults that were put in.
        caught: of those, the ones that the verification saw.
        with_stage: of those injected, the ones that have a stage.
        located: of those, the ones whose stage was named.
        faults: one record each.
        skipped: faults that could not be put in.
    """

    injected: int
    caught: int
    with_stage: int
    located: int
    faults: list[FaultResult]
    skipped: list[Skipped]

    @classmethod
    def of(cls, faults: list[FaultResult], skipped: list[Skipped]) -> Self:
        """Count."""
        return cls(
            injected=len(faults),
            caught=sum(fault.caught for fault in faults),
            with_stage=sum(fault.located is not None for fault in faults),
            located=sum(fault.located is True for fault in faults),
            faults=faults,
            skipped=skipped,
        )

    @property
    def passed(self) -> bool:
        """Whether there was a fault, and every one was caught."""
        # Of no fault at all nothing is proved.
        return 0 < self.injected == self.caught
