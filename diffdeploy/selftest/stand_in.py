"""`StandIn`: a runtime of a model in finer steps, one of which a fault replaces; the others do what the runtime does.

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
    """Substitute for a runtime: calls, generation and in-place updates of caches go through its steps.

    Args:
        runtime: runtime of a model.
    """

    def __init__(self, runtime: Runtime) -> None:
        # Shares all attributes of the runtime, including its opened artifact.
        vars(self).update(vars(runtime))

    def __call__(self, *unnamed: object, **inputs: Any) -> dict[str, Any]:
        """See `Runtime.__call__`; only arrays are supported."""
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
        """Inputs of a call; without the caches if they are updated in place."""
        return inputs

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        """Change the caches ``[B, h_kv, T or capacity, w]`` in place after a call.

        Args:
            caches: caches after the call, by the names of the cache inputs.
            newest_B: index of the last token of each row.
            past_length: number of tokens before the call, 0 for the first one.
        """


class _Buffers(CacheBuffers):
    """Buffers with a fault in their inputs or in their content."""

    def __init__(self, buffers: CacheBuffers, owner: StandIn) -> None:
        self._buffers, self._owner, self.capacity = buffers, owner, buffers.capacity

    def run(self, inputs: Mapping[str, Array]) -> Array:
        mask_BT = inputs["attention_mask"]
        past_length = mask_BT.shape[1] - inputs["input_ids"].shape[1]
        logits = self._buffers.run(self._owner.given(dict(inputs), past_length))
        # If tokens are not counted, rows are as long as the mask.
        counts_B = mask_BT.sum(1) if self._owner.spec.padding != "anywhere" else np.full(*mask_BT.shape)
        self._owner.spoil(self.arrays(), cast("Array", counts_B - 1), past_length)
        return logits

    def arrays(self) -> dict[str, Array]:
        return self._buffers.arrays()
