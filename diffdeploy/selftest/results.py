"""The result of a self-test: one record per fault, and the numbers of detected and located faults."""

from typing import Self

from diffdeploy.records import Record
from diffdeploy.selftest.fault import Fault, Place
from diffdeploy.verify.report import Report

__all__ = ["Family", "FaultResult", "SelfTest", "Skipped"]


class FaultResult(Record):
    """Result of the trial of one fault.

    Attributes:
        name: name of the fault.
        place: place into which it was introduced.
        family: kind of the damage, or of the inputs that reveal the fault.
        provable: true if a sweep should detect it.
        breaks: description of the fault.
        caught: true if the verification failed.
        by: checks that failed, and the first case that did.
        reason: message of the first of them.
        stage: stage that was named.
        expected_stage: stage that is wrong; ``None`` if the fault belongs to no single one.
        located: true if both stages agree; ``None`` if there is none to name.
        found_by: evidence by which the stage was found.
    """

    name: str
    place: Place
    family: str
    provable: bool
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
        """Create the result from the report of a completed verification."""
        failed = [f"check {check.name}" for check in report.contract if not check.passed]
        # Verification stops at the first failed case, so there is at most one.
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
        """Create the result of a bundle that was refused on opening."""
        return cls._made(fault, caught=True, by=["opening"], reason=reason, stage=None, found_by=None)

    @classmethod
    def _made(
        cls, fault: Fault, *, caught: bool, by: list[str], reason: str | None, stage: str | None, found_by: str | None
    ) -> Self:
        return cls(
            name=fault.name,
            place=fault.place,
            family=fault.family,
            provable=fault.provable,
            breaks=fault.breaks,
            caught=caught,
            by=by,
            reason=reason,
            stage=stage,
            expected_stage=fault.stage,
            # Faults that belong to no single stage, such as a missing file, have none to name.
            located=None if fault.stage is None else stage == fault.stage,
            found_by=found_by,
        )


class Skipped(Record):
    """A fault that could not be introduced, with the reason."""

    name: str
    reason: str


class Family(Record):
    """Results for faults of one kind.

    Attributes:
        name: name of the family.
        injected: number of faults that were introduced.
        caught: number of those that the verification detected.
        provable: true if the verification should detect them.
    """

    name: str
    injected: int
    caught: int
    provable: bool


class SelfTest(Record):
    """The verdict on the verification.

    Attributes:
        injected: number of provable faults that were introduced; faults that a single exact value triggers are detected
            only by chance.
        caught: number of those that the verification detected.
        with_stage: number of the injected faults that have a stage.
        located: number of those whose stage was named.
        families: results by kind of fault, including those that are not provable.
        faults: one record for each fault.
        skipped: faults that could not be introduced.
    """

    injected: int
    caught: int
    with_stage: int
    located: int
    families: list[Family]
    faults: list[FaultResult]
    skipped: list[Skipped]

    @classmethod
    def of(cls, faults: list[FaultResult], skipped: list[Skipped]) -> Self:
        """Count the results."""
        provable = [fault for fault in faults if fault.provable]
        return cls(
            injected=len(provable),
            caught=sum(fault.caught for fault in provable),
            with_stage=sum(fault.located is not None for fault in faults),
            located=sum(fault.located is True for fault in faults),
            families=[_family(name, faults) for name in dict.fromkeys(fault.family for fault in faults)],
            faults=faults,
            skipped=skipped,
        )

    @property
    def passed(self) -> bool:
        """True if there was a fault, and every provable one was detected."""
        # Without any fault, nothing is proved.
        return 0 < self.injected == self.caught


def _family(name: str, faults: list[FaultResult]) -> Family:
    of_it = [fault for fault in faults if fault.family == name]
    return Family(
        name=name,
        injected=len(of_it),
        caught=sum(fault.caught for fault in of_it),
        provable=all(fault.provable for fault in of_it),
    )
