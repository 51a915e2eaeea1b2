"""How exact an artifact must be: the budget of each dtype, with what it is based on."""

from diffdeploy.graphs import DType
from diffdeploy.records import Record

__all__ = ["BUDGETS", "CEILINGS", "Budget"]


class Budget(Record):
    """Allowed error: ``k`` times what a right computation costs, plus a floor in units of the dtype's spacing.

    A right computation costs the error of the eager block, or that of storing the streams, whichever is larger.

    Attributes:
        k: factor, for the root mean square and for the maximum alike.
        rmse_floor: times the spacing of numbers as large as the root mean square of the exact result.
        max_floor: times the spacing of numbers as large as the largest exact one.
    """

    k: float
    rmse_floor: float
    max_floor: float


# How the numbers were found: `make campaign` verifies random right exports and reports the share of the budget that
# they use; docs/verification.md has the whole table.
# k: 3 is a right computation that differs from eager in the order of its sums and in what it rounds on the way. Half
# precision accumulates in fp32, so what is stored dominates, and storing the streams is in the yardstick: 7,000 outputs
# of campaigns would have passed with k = 1.41. fp32 accumulates in what it stores, so in right exports the difference
# amplifies sums that eager never makes. 1 of 25,000 outputs needed k = 8.6: one head on a constant input, where the
# streams nearly cancel; the formula in torch, as two attentions in fp32, was as far off as the export (4.6e-7).
# floors: outputs are stored in the dtype, so even a perfect computation is off by up to eps/2 per element; in fp32,
# whose eager sums of equal numbers can be exact, by the roundings of a few additions.
# What this sees: the smallest fault of the tests beside single weights, a rotary base off by 5 %, used 7,000 budgets of
# fp32 when its k was 8. One weight off by a thousandth used 0.7: it is the contract that sees it.
BUDGETS: dict[DType, Budget] = {
    "float32": Budget(k=12.0, rmse_floor=4.0, max_floor=8.0),
    "float16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
    "bfloat16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
}

# Of eager's own error, as a share of the root mean square of the exact result: what is further off is no yardstick. On
# ordinary inputs of 43,000 outputs of right exports the largest were 1.2e-5, 1.7e-3 and 1.4e-2.
CEILINGS: dict[DType, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
