"""The cache of a model for a batch of sequences, passed from call to call or updated in place.

Shape suffixes: B batch, S new tokens, P tokens before them, T = P + S, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats import CacheBuffers
from diffdeploy.runtime.inputs import check_inputs

if TYPE_CHECKING:
    from diffdeploy.runtime.runtime import Runtime

__all__ = ["Decoding"]


class Decoding:
    """The cache of a batch of sequences, which grows with each call.

    If the backend updates caches in place, and its graph counts the tokens of a row instead of reading the positions of
    padding, the buffers hold the tokens of a row contiguously, without padding. A token that a later mask hides, such
    as the filling of a finished row, must therefore be the last one of its row, and the next token overwrites it.

    Args:
        runtime: runtime of a model.
        batch_size: number of rows.
        fill: initial value of the buffers.

    Attributes:
        num_tokens: number of tokens that were fed per row, including padding.
        buffers: buffers that are updated in place; ``None`` before the first call, or if caches are passed on.
    """

    def __init__(self, runtime: "Runtime", batch_size: int, *, fill: float = 0.0) -> None:
        self._runtime, self._spec = runtime, runtime.spec
        self._batch_size, self._fill = batch_size, fill
        self._caches: dict[str, Array] = {name: self._empty(name) for name in self._spec.caches}
        self._capacity = 0
        self.num_tokens = 0
        self.buffers: CacheBuffers | None = None

    def _empty(self, name: str) -> Array:
        _, heads, _, width = self._spec.inputs[name].shape
        return np.empty((self._batch_size, int(heads), 0, int(width)), self._spec.inputs[name].dtype)

    def reserve(self, capacity: int) -> None:
        """Allocate space for a number of tokens per row at once, which avoids later copies."""
        if capacity <= self._capacity:
            return
        wider = self._runtime.buffers(self._batch_size, capacity, self._fill)
        if wider is not None and self.buffers is not None:
            for name, array in self.buffers.arrays().items():
                wider.arrays()[name][:, :, : self._capacity] = array
        self.buffers, self._capacity = wider, capacity if wider is None else wider.capacity

    def feed(self, tokens_BS: Array, mask_BT: Array) -> Array:
        """Feed tokens and compute the logits ``[B, V]`` that follow the last token of each row.

        Args:
            tokens_BS: new tokens, int64.
            mask_BT: mask of all tokens so far, int64, 0 for padding; the last position of a row must be a token.

        Raises:
            InputError: the graph does not accept the tokens or sizes.
        """
        self.reserve(mask_BT.shape[1])
        if self.buffers is None:
            logits = self._handed_on(tokens_BS, mask_BT)
        else:
            if not self.num_tokens:
                # Checked here, since otherwise only the backend would see them.
                check_inputs(self._spec, self._inputs(tokens_BS, mask_BT))
            logits = self._in_place(self.buffers, tokens_BS, mask_BT)
        self.num_tokens = mask_BT.shape[1]
        return logits

    def _inputs(self, tokens_BS: Array, mask_BT: Array) -> dict[str, Array]:
        return {**self._new(tokens_BS, mask_BT), **self._caches}

    def _new(self, tokens_BS: Array, mask_BT: Array) -> dict[str, Array]:
        inputs: dict[str, Array] = {"input_ids": tokens_BS, "attention_mask": mask_BT}
        if "position_ids" in self._spec.inputs:
            # Padding does not count as a position.
            counted = np.maximum(mask_BT.cumsum(1) - 1, 0)
            inputs["position_ids"] = np.ascontiguousarray(counted[:, -tokens_BS.shape[1] :])
        return inputs

    def bare_call(self, tokens_B1: Array, mask_BT: Array) -> Callable[[], object]:
        """Prepare the call that `feed` would make for one token per row, so that its time can be measured separately.

        Args:
            tokens_B1: tokens, see `feed`; other tokens must have been fed before.
            mask_BT: mask, see `feed`.
        """
        self.reserve(mask_BT.shape[1])
        if self.buffers is None:
            return partial(self._runtime, **self._inputs(tokens_B1, mask_BT))
        if self._spec.padding == "anywhere":
            return partial(self.buffers.run, self._new(tokens_B1, mask_BT))
        before_B = mask_BT[:, :-1].sum(1)
        return partial(self.buffers.run, self._inputs_in_place(tokens_B1, before_B, before_B + 1))

    def _handed_on(self, tokens_BS: Array, mask_BT: Array) -> Array:
        outputs = self._runtime(**self._inputs(tokens_BS, mask_BT))
        self._caches = {name: outputs[present] for name, present in self._spec.caches.items()}
        last: Array = outputs[self._spec.main_output][:, -1]
        return last

    def _in_place(self, buffers: CacheBuffers, tokens_BS: Array, mask_BT: Array) -> Array:
        if self._spec.padding == "anywhere":
            last: Array = buffers.run(self._new(tokens_BS, mask_BT))[:, -1]
            return last
        length = tokens_BS.shape[1]
        new_BS, before_B = mask_BT[:, -length:] == 1, mask_BT[:, :-length].sum(1)
        if self.num_tokens and len(tokens_BS) > 1:
            # If tokens are already cached, the operator supports several new tokens only for one row.
            for place in range(length):
                logits = self._call(buffers, tokens_BS[:, place : place + 1], before_B, np.ones_like(before_B))
                # A row with fewer tokens got an entry beyond its end, which its next token will overwrite.
                before_B = before_B + new_BS[:, place]
            return logits
        order = np.argsort(~new_BS, axis=1, kind="stable")
        counts = new_BS.sum(1)
        return self._call(buffers, np.take_along_axis(tokens_BS, order, axis=1)[:, : counts.max()], before_B, counts)

    def _call(self, buffers: CacheBuffers, tokens_BS: Array, before_B: Array, counts_B: Array) -> Array:
        """Logits of the last new token of each row, where new tokens precede all padding."""
        logits = buffers.run(self._inputs_in_place(tokens_BS, before_B, before_B + counts_B))
        last = counts_B - 1 if logits.shape[1] > 1 else np.zeros_like(counts_B)
        chosen: Array = logits[np.arange(len(logits)), last]
        return chosen

    def _inputs_in_place(self, tokens_BS: Array, before_B: Array, totals_B: Array) -> dict[str, Array]:
        mask = (np.arange(int(totals_B.max())) < totals_B[:, None]).astype(np.int64)
        inputs = {"input_ids": np.ascontiguousarray(tokens_BS), "attention_mask": mask}
        if "position_ids" in self._spec.inputs:
            positions = before_B[:, None] + np.arange(tokens_BS.shape[1])
            inputs["position_ids"] = np.minimum(positions, totals_B[:, None] - 1)
        return inputs

    def caches(self, mask_BT: Array) -> Mapping[str, Array]:
        """Keys and values of all tokens so far ``[B, h_kv, T, w]``, by the names of the graph's cache outputs.

        Args:
            mask_BT: mask of the last call. If the graph counts tokens, entries of padding are set to 0.
        """
        if self.buffers is None:
            return {self._spec.caches[name]: array for name, array in self._caches.items()}
        total, found = mask_BT.shape[1], {}
        for name, buffer in self.buffers.arrays().items():
            if self._spec.padding == "anywhere":
                found[self._spec.caches[name]] = buffer[:, :, :total].copy()
                continue
            whole = np.zeros((*buffer.shape[:2], total, buffer.shape[3]), buffer.dtype)
            for row, shown in enumerate(mask_BT == 1):
                whole[row][:, shown] = buffer[row, :, : int(shown.sum())]
            found[self._spec.caches[name]] = whole
        return found
