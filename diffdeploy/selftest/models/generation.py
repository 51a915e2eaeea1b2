"""Faults in generation: correct calls whose tokens are combined wrongly."""

from typing import Any

import numpy as np

from diffdeploy.selftest.conditions import rows_above
from diffdeploy.selftest.fault import Fault
from diffdeploy.selftest.models.caches import entered
from diffdeploy.selftest.stand_in import StandIn

__all__ = ["GENERATION_FAULTS"]

GENERATION_FAULTS: list[Fault] = []
_FAMILY = "generation"


@entered(
    GENERATION_FAULTS,
    _FAMILY,
    "generates_the_wrong_row",
    "each row is continued with the tokens of the previous one",
    rows_above(1),
)
class WrongRow(StandIn):
    """Each prompt is continued with the tokens of the previous one."""

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        found = super().generate(input_ids, attention_mask, **options)
        length = input_ids.shape[1]
        found[:, length:] = np.roll(found[:, length:], 1, axis=0)
        return found


@entered(GENERATION_FAULTS, _FAMILY, "generation_forgets_the_prompt", "only the last token of a prompt is seen")
class ForgetsThePrompt(StandIn):
    """Only the last token of each prompt is continued."""

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        mask = np.zeros_like(input_ids)
        mask[:, -1] = 1
        return super().generate(input_ids, mask, **options)


@entered(
    GENERATION_FAULTS, _FAMILY, "generation_sees_padding", "the padding of a prompt is treated as tokens", rows_above(1)
)
class SeesPadding(StandIn):
    """The padding of a prompt is treated as tokens."""

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        return super().generate(input_ids, None, **options)


@entered(
    GENERATION_FAULTS, _FAMILY, "generation_a_token_late", "every token is one step late, and the first occurs twice"
)
class ATokenLate(StandIn):
    """Every token is one step late, and the first one occurs twice."""

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        found = super().generate(input_ids, attention_mask, **options)
        length = input_ids.shape[1]
        found[:, length + 1 :] = found[:, length:-1].copy()
        return found


@entered(GENERATION_FAULTS, _FAMILY, "generation_one_token_wrong", "the last token of the last row is wrong")
class OneTokenWrong(StandIn):
    """The last token of the last row is wrong."""

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        found = super().generate(input_ids, attention_mask, **options)
        found[-1, -1] ^= 1
        return found


@entered(
    GENERATION_FAULTS, _FAMILY, "generation_beyond_the_capacity", "the start of a prompt that is too long is dropped"
)
class BeyondTheCapacity(StandIn):
    """The start of a prompt that is too long is silently dropped."""

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        most = self.spec.axes["total_sequence_length"].max + 1 - options["max_new_tokens"]
        over = max(0, input_ids.shape[1] - most)
        mask = None if attention_mask is None else attention_mask[:, over:]
        found = super().generate(input_ids[:, over:], mask, **options)
        return np.concatenate((input_ids[:, :over], found), axis=1)
