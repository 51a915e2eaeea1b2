"""What is said about the guilty stage."""

from typing import Literal

from pydantic import Field

from diffdeploy.records import Record, Rounded

__all__ = ["Finding", "StageError"]


class StageError(Record):
    """How far one stage of an artifact is off.

    Attributes:
        stage: its name.
        rmse: root mean square of the artifact's error at this stage against fp64; ``None`` for NaN or infinity.
        eager_rmse: the same of the formula in the artifact's dtype.
        amplification: the first over the second, which is at least what rounding to the dtype costs.
        deviates: whether that is more than rounding explains.
        node: where the artifact computes it.
    """

    stage: str
    rmse: Rounded | None
    eager_rmse: Rounded
    amplification: Rounded | None
    deviates: bool
    node: str | None


class Finding(Record):
    """The guilty stage of a failed verification.

    Attributes:
        stage: the first stage that deviates; ``None`` when none does.
        found_by: ``constants``, where a check has named one; ``intermediate values`` of the artifact; ``probes``,
            inputs for which all stages but a few are known to agree.
        node: of the artifact, where the stage is computed.
        detail: one clause for people.
        stages: errors of all stages that the artifact shows.
    """

    stage: str | None
    found_by: Literal["constants", "intermediate values", "probes"]
    node: str | None = None
    detail: str
    stages: list[StageError] = Field(default_factory=list)
