"""`StandIn`: a runtime of a model with finer steps of which a fault can replace one; without a fault it is the runtime.

Shape suffixes: B batch, S new tokens, P past tokens, T = P + S.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats import CacheBuffers
from diffdeploy.runtime import Runtime

__all__ = ["StandIn"]


class StandIn(Runtime):
    """Stands in place of a runtime: calls, generation and caches written in place go through its steps.

    Args:
        runtime: of a model.
    """

    def __init__(self, runtime: Runtime) -> None:
        # All that it has, its opened artifact among it.
        vars(self).update(vars(runtime))

    def __call__(self, *unnamed: object, **inputs: Any) -> dict[str, Any]:
        """See `Runtime.__call__`; of arrays."""
        spec = self.spec
        past_length = inputs["attention_mask"].shape[1] - inputs[spec.main_input].shape[1]
        outputs = super().__call__(*unnamed, **self.given(inputs, past_length))
        caches = {name: outputs[present].copy() for name, present in spec.caches.items()}
        newest_B = np.full(len(inputs[spec.main_input]), past_length + inputs[spec.main_input].shape[1] - 1)
        self.spoil(caches, newest_B, past_length)
        return {**outputs, **{spec.caches[name]: array for name, array in caches.items()}}

    def buffers(self, batch_size: int, capacity: int, fill: float = 0.0) -> CacheBuffers | None:
        """See `Runtime.buffers`."""
        found = super().buffers(batch_size, capacity, fill)
        return None if found is None else _Buffers(found, self)

    def given(self, inputs: dict[str, Any], past_length: int) -> dict[str, Any]:
        """What a call is given; of one in place, without the caches."""
        return inputs

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        """Change caches ``[B, h_kv, T or capacity, w]`` behind a call, by the names of the inputs that take them.

        Args:
            caches: as the call left them.
            newest_B: place of the last token of each row.
            past_length: tokens before the call, 0 where it was the first.
        """


class _Buffers(CacheBuffers):
    """Buffers with a fault in what they are given, or in what they hold."""

    def __init__(self, buffers: CacheBuffers, owner: StandIn) -> None:
        self._buffers, self._owner, self.capacity = buffers, owner, buffers.capacity

    def run(self, inputs: Mapping[str, Array]) -> Array:
        mask_BT = inputs["attention_mask"]
        past_length = mask_BT.shape[1] - inputs["input_ids"].shape[1]
        logits = self._buffers.run(self._owner.given(dict(inputs), past_length))
        # Where tokens are not counted, rows are as long as the mask.
        counts_B = mask_BT.sum(1) if self._owner.spec.padding != "anywhere" else np.full(*mask_BT.shape)
        self._owner.spoil(self.arrays(), cast("Array", counts_B - 1), past_length)
        return logits

    def arrays(self) -> dict[str, Array]:
        return self._buffers.arrays()
