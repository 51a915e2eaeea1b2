"""A batch of sequences on its way: prompts and their cache, and the logits of what comes next.

The cache is handed on from call to call, or written in place where the backend can. Shape suffixes: B batch, S new
tokens, T all tokens so far.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats import CacheBuffers
from diffdeploy.runtime.inputs import check_inputs

if TYPE_CHECKING:
    from diffdeploy.runtime.runtime import Runtime

__all__ = ["Decoding"]


class Decoding:
    """Prompts that are continued token by token.

    Args:
        runtime: of a model.
        input_ids: prompts ``[B, S]``, int64, padded on the left.
        attention_mask: ``[B, S]``, int64, 0 for padding.
        capacity: most tokens of a row that will be fed, padding of the prompt included.
        fill: what the buffers of a cache that is written in place hold before.

    Attributes:
        buffers: where the cache is written in place; ``None`` where it is handed on.

    Raises:
        InputError: the prompts are not what the graph accepts.
    """

    def __init__(
        self, runtime: "Runtime", input_ids: Array, attention_mask: Array, *, capacity: int, fill: float = 0.0
    ) -> None:
        self._runtime, self._spec = runtime, runtime.spec
        self._prompt, self._mask = input_ids, attention_mask
        self._caches: dict[str, Array] = {name: self._empty(name) for name in self._spec.caches}
        # Otherwise a backend with buffers of its own would be the first to look at them.
        check_inputs(self._spec, self._inputs(input_ids))
        self.buffers: CacheBuffers | None = runtime.buffers(len(input_ids), capacity, fill)

    def _empty(self, name: str) -> Array:
        _, heads, _, width = self._spec.inputs[name].shape
        return np.empty((len(self._prompt), int(heads), 0, int(width)), self._spec.inputs[name].dtype)

    def _inputs(self, tokens_BS: Array) -> dict[str, Array]:
        inputs: dict[str, Array] = {"input_ids": tokens_BS, "attention_mask": self._mask, **self._caches}
        if "position_ids" in self._spec.inputs:
            inputs["position_ids"] = np.ascontiguousarray(_positions(self._mask)[:, -tokens_BS.shape[1] :])
        return inputs

    def prefill(self) -> Array:
        """Logits ``[B, V]`` of what follows the prompts."""
        if self.buffers is None:
            return self._handed_on(self._prompt)
        # The operator counts tokens from the first, so that padding goes behind them.
        counts, length = self._mask.sum(1), self._prompt.shape[1]
        order = np.argsort(self._mask == 0, axis=1, kind="stable")
        behind = (np.arange(length) < counts[:, None]).astype(np.int64)
        inputs = {"input_ids": np.take_along_axis(self._prompt, order, axis=1), "attention_mask": behind}
        return self._in_place(inputs, _positions(behind), counts - 1)

    def step(self, tokens_B: Array) -> Array:
        """Logits ``[B, V]`` of what follows one more token in every row."""
        self._mask = np.concatenate((self._mask, np.ones((len(self._mask), 1), np.int64)), axis=1)
        if self.buffers is None:
            return self._handed_on(tokens_B[:, None])
        counts = self._mask.sum(1)
        behind = (np.arange(int(counts.max())) < counts[:, None]).astype(np.int64)
        inputs = {"input_ids": np.ascontiguousarray(tokens_B[:, None]), "attention_mask": behind}
        return self._in_place(inputs, counts[:, None] - 1, np.zeros_like(counts))

    def _handed_on(self, tokens_BS: Array) -> Array:
        outputs = self._runtime(**self._inputs(tokens_BS))
        self._caches = {name: outputs[present] for name, present in self._spec.caches.items()}
        last: Array = outputs[self._spec.main_output][:, -1]
        return last

    def _in_place(self, inputs: dict[str, Array], positions_BS: Array, last_B: Array) -> Array:
        assert self.buffers is not None
        if "position_ids" in self._spec.inputs:
            inputs["position_ids"] = positions_BS
        logits = self.buffers.run(inputs)
        if logits.shape[1] == 1:
            last_B = np.zeros_like(last_B)
        chosen: Array = logits[np.arange(len(logits)), last_B]
        return chosen

    def caches(self) -> Mapping[str, Array]:
        """Keys and values of all tokens so far ``[B, h_kv, T, w]``, by the names of the outputs that hand them on.

        Where a cache is written in place, cells of padding hold 0.
        """
        if self.buffers is None:
            return {self._spec.caches[name]: array for name, array in self._caches.items()}
        tokens_BT, found = self._mask == 1, {}
        for name, buffer in self.buffers.arrays().items():
            whole = np.zeros((*buffer.shape[:2], tokens_BT.shape[1], buffer.shape[3]), buffer.dtype)
            for row, shown in enumerate(tokens_BT):
                whole[row][:, shown] = buffer[row, :, : int(shown.sum())]
            found[self._spec.caches[name]] = whole
        return found


def _positions(mask_BT: Array) -> Array:
    """Padding takes no position."""
    counted: Array = np.ascontiguousarray(np.maximum(mask_BT.cumsum(1) - 1, 0))
    return counted
