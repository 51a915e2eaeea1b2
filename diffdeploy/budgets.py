"""The error budget of each dtype: how exact an artifact must be, with the evidence behind each number."""

from diffdeploy.graphs import DType
from diffdeploy.records import Record

__all__ = ["ACTIVATION_SHARE", "BUDGETS", "CEILINGS", "ActivationShare", "Budget"]


class Budget(Record):
    """Allowed error: ``k`` times the error of a correct computation, plus a floor in units of the dtype's spacing.

    The error of a correct computation is that of the eager block, or that of storing the streams, whichever is larger.

    Attributes:
        k: factor for both the root mean square error and the maximum error.
        rmse_floor: floor of the root mean square error, in multiples of the dtype's spacing at the root mean square of
            the exact result.
        max_floor: floor of the maximum error, in multiples of the dtype's spacing at the largest exact value.
    """

    k: float
    rmse_floor: float
    max_floor: float


class ActivationShare(Record):
    """Allowance for quantised activations, as a share of the distance by which quantising them moves the exact result.

    Attributes:
        rmse: share of the root mean square distance.
        max_error: share of the largest distance.
    """

    rmse: float
    max_error: float


# How the numbers were found: `make campaign` verifies random correct exports and reports the share of the budget that
# they use; docs/verification.md has the whole table.
# k: 3 covers a correct computation that differs from eager in the order of its sums and in its intermediate roundings.
# Half precision accumulates in fp32, so the rounding of stored values dominates, and the yardstick includes storing the
# streams: 7,000 outputs of campaigns would have passed with k = 1.41. fp32 accumulates in the dtype that it stores, so
# subtracting the streams amplifies summation errors, which eager does not have. 1 of 25,000 outputs needed k = 8.6: one
# head on a constant input, where the streams nearly cancel; the formula in torch, computed as two attentions in fp32,
# had the same error as the export (4.6e-7).
# floors: outputs are stored in the dtype, so even a perfect computation is off by up to eps/2 per element; in fp32,
# eager sums of equal numbers can be exact, so the floor also covers the roundings of a few additions.
# What this detects: apart from single wrong weights, the smallest fault in the tests, a rotary base off by 5 %, used
# 7,000 times the fp32 budget when its k was 8. One weight off by a thousandth used only 0.7 of the budget, but the
# contract detects it.
BUDGETS: dict[DType, Budget] = {
    "float32": Budget(k=12.0, rmse_floor=4.0, max_floor=8.0),
    "float16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
    "bfloat16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
}

# Largest error of eager itself, as a share of the root mean square of the exact result. An eager block with a larger
# error cannot serve as a yardstick, unless storing two streams that nearly cancel causes an error just as large. In
# 43,000 outputs of correct exports on ordinary inputs, the largest shares were 1.2e-5, 1.7e-3 and 1.4e-2.
CEILINGS: dict[DType, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}

# An activation next to the boundary between two integers may become either, and from there on, every rounding may
# differ: two results whose roundings have nothing in common are about sqrt(2) of the distance apart. In 129
# verifications of correct exports, the largest shares were 1.79 (rmse) and 2.57 (max); in 161,000 outputs of eager
# models and their layers, whose float32 sums differ from the formula in the same way, 1.36 and 2.10. Half of all were
# below 1e-4, since every rounding agreed.
ACTIVATION_SHARE = ActivationShare(rmse=3.0, max_error=4.0)
