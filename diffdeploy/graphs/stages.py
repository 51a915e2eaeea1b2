"""The stages of a block, in the order in which they are checked to locate a deviation."""

from enum import StrEnum

__all__ = ["Stage", "stage_of_weight"]


class Stage(StrEnum):
    """A stage of differential attention. The cache holds the results of the projections and the rotary embedding."""

    Q_PROJECTION = "q projection"
    K_PROJECTION = "k projection"
    V_PROJECTION = "v projection"
    ROPE = "rope"
    # The cache holds rotated keys, so it comes after the rotary embedding.
    CACHE = "cache"
    SIGNAL = "signal attention"
    NOISE = "noise attention"
    LAMBDA = "lambda"
    DIFFERENCE = "difference"
    NORM = "norm"
    OUTPUT_PROJECTION = "output projection"


_OF_WEIGHT = {
    "q_proj": Stage.Q_PROJECTION,
    # The norm of queries and keys is not a separate stage.
    "q_norm": Stage.Q_PROJECTION,
    "k_proj": Stage.K_PROJECTION,
    "k_norm": Stage.K_PROJECTION,
    "v_proj": Stage.V_PROJECTION,
    "subln": Stage.NORM,
    "lambda_proj": Stage.LAMBDA,
    "out_proj": Stage.OUTPUT_PROJECTION,
}


def stage_of_weight(name: str) -> Stage:
    """The stage that a canonical weight belongs to."""
    # The table omits only the lambda vectors.
    return _OF_WEIGHT.get(name.partition(".")[0], Stage.LAMBDA)
