"""Records of what was found about the guilty stage."""

from typing import Literal

from pydantic import Field

from diffdeploy.records import Record, Rounded

__all__ = ["Finding", "StageError"]


class StageError(Record):
    """Error of one stage of an artifact.

    Attributes:
        stage: name of the stage.
        rmse: root mean square error of the artifact at this stage, against fp64; ``None`` for NaN or infinity.
        eager_rmse: root mean square error of the formula in the artifact's dtype.
        amplification: ratio of ``rmse`` to ``eager_rmse``, or to the cost of rounding to the dtype if that is larger.
        deviates: true if the error is larger than rounding explains.
        node: node of the artifact that computes the stage.
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
        stage: the first stage that deviates; ``None`` if none does.
        found_by: evidence: ``constants``, if a check found a wrong one; ``intermediate values`` of the artifact; or
            ``probes``, which are inputs whose outputs only a few stages can affect.
        node: node of the artifact that computes the stage.
        detail: human-readable explanation, one clause.
        stages: errors of all stages whose values can be observed in the artifact.
    """

    stage: str | None
    found_by: Literal["constants", "intermediate values", "probes"]
    node: str | None = None
    detail: str
    stages: list[StageError] = Field(default_factory=list)
