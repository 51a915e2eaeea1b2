"""What a self-test says: one record per fault, and how many were caught and located."""

from typing import Self

from diffdeploy.records import Record
from diffdeploy.selftest.fault import Fault, Place
from diffdeploy.verify.report import Report

__all__ = ["Family", "FaultResult", "SelfTest", "Skipped"]


class FaultResult(Record):
    """How one fault fared.

    Attributes:
        name: of the fault.
        place: where it was put in.
        family: what kind of inputs or of damage shows it.
        provable: whether a sweep can be expected to see it.
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
            family=fault.family,
            provable=fault.provable,
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


class Family(Record):
    """Faults of one kind.

    Attributes:
        name: of the family.
        injected: faults that were put in.
        caught: of those, the ones that the verification saw.
        provable: whether it can be expected to see them.
    """

    name: str
    injected: int
    caught: int
    provable: bool


class SelfTest(Record):
    """The verdict on the verification.

    Attributes:
        injected: faults that were put in and can be proved: an exact value that triggers a fault is met by chance.
        caught: of those, the ones that the verification saw.
        with_stage: of those injected, the ones that have a stage.
        located: of those, the ones whose stage was named.
        families: the same by kinds of faults, those that cannot be proved among them.
        faults: one record each.
        skipped: faults that could not be put in.
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
        """Count."""
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
        """Whether there was a fault, and every one that can be proved was caught."""
        # Of no fault at all nothing is proved.
        return 0 < self.injected == self.caught


def _family(name: str, faults: list[FaultResult]) -> Family:
    of_it = [fault for fault in faults if fault.family == name]
    return Family(
        name=name,
        injected=len(of_it),
        caught=sum(fault.caught for fault in of_it),
        provable=all(fault.provable for fault in of_it),
    )
