"""Text out of a model bundle: one token after the other, with the cache handed on, for every format.

Shape suffixes: B batch, S prompt, T all tokens so far.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError
from diffdeploy.runtime.sampling import Sampling

if TYPE_CHECKING:
    from diffdeploy.runtime.runtime import Runtime

__all__ = ["GenerationOptions", "Streamer", "eos_of", "stream"]

# Where a source's config class takes one that its files leave out.
_CLASS_DEFAULTS = {"diffllama": 2}


class Streamer(Protocol):
    """What Hugging Face's streamers are: `put` takes the prompt ``[B, S]`` and then tokens ``[B]``."""

    def put(self, value: Any) -> None:
        """Take tokens."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


def eos_of(bundle: Bundle) -> tuple[int, ...]:
    """Tokens that end a text: of ``generation_config.json``, else of ``config.json``, else of the source's class."""
    for name in ("generation_config.json", "config.json"):
        if name not in bundle.manifest.files:
            continue
        fields = json.loads((bundle.path / name).read_text(encoding="utf-8"))
        found = fields.get("eos_token_id")
        # null says that there is none; only a field that is absent is left to the class.
        if name == "config.json" and "eos_token_id" not in fields:
            found = _CLASS_DEFAULTS.get(str(fields.get("model_type")))
        if found is not None:
            return tuple(int(token) for token in (found if isinstance(found, list) else [found]))
    return ()


class GenerationOptions(TypedDict, total=False):
    """How tokens are chosen and when a row ends; see `Sampling` for the first six.

    Attributes:
        do_sample: draw tokens; else the most probable ones.
        temperature: what logits are divided by.
        top_k: draw from so many.
        top_p: draw from the most probable ones with so much probability.
        repetition_penalty: against tokens that are there already.
        seed: of the draws.
        eos_token_id: what ends a row; by default the model's own, see `eos_of`; ``None`` for nothing.
        pad_token_id: what a row that has ended is filled with; by default the first of those, or 0.
        min_new_tokens: no row ends before.
    """

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    min_new_tokens: int


_OF_ROWS = ("eos_token_id", "pad_token_id", "min_new_tokens")


def stream(
    runtime: "Runtime",
    input_ids: Array,
    attention_mask: Array | None = None,
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> Iterator[Array]:
    """New tokens ``[B]`` of all rows, step by step, until every row has ended or there are enough.

    Args:
        runtime: of a model.
        input_ids: prompts ``[B, S]``, int64, padded at the left.
        attention_mask: ``[B, S]``, 0 for padding; ``None`` for none.
        max_new_tokens: most tokens.
        **options: see `GenerationOptions`.

    Raises:
        InputError: tokens, a mask, lengths or an option that are not accepted.
    """
    given = dict(options)
    if unknown := sorted(given.keys() - GenerationOptions.__annotations__.keys()):
        raise InputError(f"{unknown[0]} is not an option; accepted: {', '.join(GenerationOptions.__annotations__)}")
    sampling = Sampling(**{name: value for name, value in given.items() if name not in _OF_ROWS})  # type: ignore[arg-type]
    eos = _tokens(options["eos_token_id"]) if "eos_token_id" in options else eos_of(runtime.bundle)
    pad, least = options.get("pad_token_id"), options.get("min_new_tokens", 0)
    if pad is None:
        pad = eos[0] if eos else 0
    # Checked now: a generator would do it when the first token is asked for.
    mask = _checked(runtime, input_ids, attention_mask, max_new_tokens)
    return _steps(runtime, input_ids, mask, sampling, max_new_tokens=max_new_tokens, eos=eos, pad=pad, least=least)


def _tokens(given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


def _steps(
    runtime: "Runtime",
    input_ids: Array,
    mask: Array,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    pad: int,
    least: int,
) -> Iterator[Array]:
    spec, positioned = runtime.spec, "position_ids" in runtime.spec.inputs
    batch = len(input_ids)
    caches = {name: _empty(runtime, name, batch) for name in spec.caches}
    tokens, ended, draws = input_ids, np.zeros(batch, bool), sampling.generator()
    before = [row[kept] for row, kept in zip(input_ids, mask == 1, strict=True)]
    for step in range(max_new_tokens):
        given: dict[str, Array] = {"input_ids": tokens, "attention_mask": mask, **caches}
        if positioned:
            # Padding takes no position.
            given["position_ids"] = np.ascontiguousarray(np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :])
        outputs = runtime(**given)
        forbidden = np.array(eos if step < least else [], np.int64)
        chosen = sampling.choose(outputs[spec.main_output][:, -1], before, forbidden, draws)
        chosen = np.where(ended, pad, chosen)
        if sampling.repetition_penalty != 1:
            before = [np.append(row, token) for row, token in zip(before, chosen, strict=True)]
        yield chosen
        ended |= np.isin(chosen, eos)
        if ended.all():
            return
        caches = {name: outputs[present] for name, present in spec.caches.items()}
        tokens = chosen[:, None]
        mask = np.concatenate((mask, np.ones((batch, 1), np.int64)), axis=1)


def _empty(runtime: "Runtime", name: str, batch: int) -> Array:
    _, heads, _, width = runtime.spec.inputs[name].shape
    return np.empty((batch, int(heads), 0, int(width)), runtime.spec.dtype)


def _checked(runtime: "Runtime", input_ids: Array, attention_mask: Array | None, max_new_tokens: int) -> Array:
    """The mask, once everything fits."""
    if runtime.spec.variant != "model":
        raise InputError(f"{runtime.bundle.path} holds a block, which gives no tokens; export a whole model")
    if input_ids.ndim != 2 or input_ids.dtype != np.int64:  # noqa: PLR2004 - rows and tokens
        raise InputError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; accepted is int64 [batch, tokens]")
    if input_ids.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; accepted is 1 or more")
    capacity, length = runtime.spec.axes["total_sequence_length"].max, input_ids.shape[1]
    # The last token is given out, and enters no cache.
    if length + max_new_tokens - 1 > capacity:
        raise InputError(
            f"the prompt has {length} tokens and {max_new_tokens} are to come; the bundle was exported for "
            f"{capacity} (--max-sequence-length)"
        )
    mask = np.ones_like(input_ids) if attention_mask is None else np.asarray(attention_mask).astype(np.int64)
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {list(mask.shape)}; accepted is {list(input_ids.shape)}")
    if not mask[:, -1].all():
        raise InputError(
            "attention_mask ends in padding; prompts are padded at the left, so that new tokens follow them"
        )
    return mask
