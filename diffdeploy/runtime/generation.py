"""Tokens out of a model bundle: one after the other, with the cache handed on, for every format.

Shape suffixes: B batch, S new tokens of a prompt, T all tokens so far, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypedDict

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, special_tokens
from diffdeploy.errors import InputError
from diffdeploy.runtime.decoding import Decoding
from diffdeploy.runtime.inputs import check_size, check_values
from diffdeploy.runtime.sampling import Sampling
from diffdeploy.runtime.text import RowText

if TYPE_CHECKING:
    from diffdeploy.runtime.runtime import Runtime

__all__ = ["Context", "GenerationOptions", "Step", "Streamer", "eos_of", "steps"]


class Streamer(Protocol):
    """What Hugging Face's streamers are: `put` takes the prompt ``[B, S]`` and then tokens ``[B]``."""

    def put(self, value: Any) -> None:
        """Take tokens."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


def eos_of(bundle: Bundle) -> tuple[int, ...]:
    """Tokens that end a text; see `diffdeploy.bundle.special_tokens`.

    Raises:
        InputError: a file does not say it in numbers.
    """
    return special_tokens(bundle.path, bundle.manifest).end


class GenerationOptions(TypedDict, total=False):
    """How tokens are chosen and when a row ends; see `Sampling` for the first six.

    Attributes:
        do_sample: draw tokens; else the most probable ones.
        temperature: what logits are divided by.
        top_k: draw from so many.
        top_p: draw from the most probable ones with so much probability.
        repetition_penalty: against tokens that are there already, padding aside.
        seed: of the draws.
        eos_token_id: what ends a row; by default the model's own, see `eos_of`; ``None`` for nothing.
        pad_token_id: what a row that has ended is filled with; by default the first of those, or 0.
        min_new_tokens: no row is ended by such a token before.
        stop: texts that end a row; its tokens are the last ones that it gets, and its text ends before.
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
    stop: str | Sequence[str] | None


_OF_ROWS = ("eos_token_id", "pad_token_id", "min_new_tokens", "stop")


class Step(NamedTuple):
    """One token of each row.

    Attributes:
        tokens: ``[B]``, int64.
        texts: what can be shown of each row with them; ``None`` where the bundle has no tokenizer.
    """

    tokens: Array
    texts: tuple[str, ...] | None


@dataclass
class Context:
    """What came before in each row, and the cache of what the model has seen of it.

    Attributes:
        tokens: ``[B, T]``, int64.
        mask: ``[B, T]``, int64, 0 for padding.
        filling: ``[B, T]``, bool: what rows that had ended were filled with.
        decoding: what the model has seen of it; the last token that was chosen it has not.
    """

    tokens: Array
    mask: Array
    filling: Array
    decoding: Decoding

    @classmethod
    def empty(cls, runtime: "Runtime", batch: int) -> Self:
        """Nothing came before."""
        nothing = np.zeros((batch, 0), np.int64)
        return cls(nothing, nothing, nothing.astype(bool), Decoding(runtime, batch))

    def extended(self, input_ids: Array, mask: Array) -> tuple[Array, Array, Array]:
        """Tokens, mask and filling with a prompt behind them; what filled rows is padding from now on."""
        return (
            np.concatenate((self.tokens, input_ids), axis=1),
            np.concatenate((np.where(self.filling, 0, self.mask), mask), axis=1),
            np.concatenate((self.filling, np.zeros(input_ids.shape, bool)), axis=1),
        )


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """When rows end: see `GenerationOptions`."""

    max_new_tokens: int
    min_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    stop: tuple[str, ...]

    @classmethod
    def of(cls, bundle: Bundle, max_new_tokens: int, options: GenerationOptions) -> Self:
        eos = _tokens(options["eos_token_id"]) if "eos_token_id" in options else eos_of(bundle)
        pad, stop, least = options.get("pad_token_id"), options.get("stop"), options.get("min_new_tokens", 0)
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in stop:
            raise InputError("stop holds an empty text, which every text has; leave it out")
        for name, number, smallest in (("max_new_tokens", max_new_tokens, 1), ("min_new_tokens", least, 0)):
            if number < smallest:
                raise InputError(f"{name} is {number}; accepted is {smallest} or more")
        if pad is None:
            pad = eos[0] if eos else 0
        return cls(max_new_tokens=max_new_tokens, min_new_tokens=least, eos=eos, pad=pad, stop=stop)


def _tokens(given: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if given is None else tuple(int(token) for token in np.atleast_1d(given))


def steps(
    runtime: "Runtime",
    context: Context,
    input_ids: Array,
    attention_mask: Array | None,
    *,
    max_new_tokens: int,
    with_text: bool,
    options: GenerationOptions,
) -> Iterator[Step]:
    """New tokens of all rows, step by step, until every row has ended or there are enough.

    Args:
        runtime: of a model.
        context: what came before; each step puts into it what it gives.
        input_ids: prompts ``[B, S]``, int64, padded at the left.
        attention_mask: ``[B, S]``, 0 for padding; ``None`` for none.
        max_new_tokens: most tokens.
        with_text: whether texts are wanted.
        options: see `GenerationOptions`.

    Raises:
        InputError: tokens, a mask, lengths or an option that are not accepted, or a text is asked for and there is no
            tokenizer. Nothing is in the context then.
        UnavailableError: a text is asked for, and the package tokenizers is not installed.
    """
    if unknown := sorted(options.keys() - GenerationOptions.__annotations__.keys()):
        raise InputError(f"{unknown[0]} is not an option; accepted: {', '.join(GenerationOptions.__annotations__)}")
    sampling = Sampling(**{name: value for name, value in options.items() if name not in _OF_ROWS})  # type: ignore[arg-type]
    ends = _Ends.of(runtime.bundle, max_new_tokens, options)
    # Checked now: a generator would do it when the first token is asked for.
    mask = _checked(runtime, context, input_ids, attention_mask, max_new_tokens)
    rows = []
    if with_text or ends.stop:
        held = context.extended(input_ids, mask)
        rows = [RowText(runtime.tokenizer, row[kept == 1], ends.stop) for row, kept in zip(*held[:2], strict=True)]
    return _steps(runtime, context, context.extended(input_ids, mask), sampling, ends, rows)


def _steps(
    runtime: "Runtime",
    context: Context,
    extended: tuple[Array, Array, Array],
    sampling: Sampling,
    ends: _Ends,
    rows: list[RowText],
) -> Iterator[Step]:
    tokens, mask, filling = extended
    ended, draws = np.zeros(len(tokens), bool), sampling.generator()
    seen_BV = _seen(runtime, tokens, mask)
    # The last token is given out, and enters no cache.
    context.decoding.reserve(tokens.shape[1] + ends.max_new_tokens - 1)
    for step in range(ends.max_new_tokens):
        logits = context.decoding.feed(tokens[:, context.decoding.num_tokens :], mask)
        forbidden = np.array(ends.eos if step < ends.min_new_tokens else [], np.int64)
        chosen = sampling.choose(logits, seen_BV, forbidden, draws)
        chosen = np.where(ended, ends.pad, chosen)
        seen_BV[np.arange(len(chosen)), chosen] |= ~ended
        tokens = np.concatenate((tokens, chosen[:, None]), axis=1)
        mask = np.concatenate((mask, np.ones((len(chosen), 1), np.int64)), axis=1)
        filling = np.concatenate((filling, ended[:, None]), axis=1)
        context.tokens, context.mask, context.filling = tokens, mask, filling
        before, ended = ended, ended | np.isin(chosen, ends.eos)
        last = ended | (step == ends.max_new_tokens - 1)
        texts = (
            tuple(
                "" if done else row.add(int(token), last=bool(final))
                for row, token, done, final in zip(rows, chosen, before, last, strict=True)
            )
            if rows
            else None
        )
        ended |= [row.stopped for row in rows] if rows else False
        yield Step(chosen, texts)
        if ended.all():
            return


def _seen(runtime: "Runtime", tokens: Array, mask: Array) -> Array:
    """Which tokens of the vocabulary each row has, ``[B, V]``; padding is none of them."""
    vocab_size = runtime.spec.outputs[runtime.spec.main_output].shape[-1]
    seen = np.zeros((len(tokens), int(vocab_size)), bool)
    rows, columns = np.nonzero(mask)
    seen[rows, tokens[rows, columns]] = True
    return seen


def _checked(
    runtime: "Runtime", context: Context, input_ids: Array, attention_mask: Array | None, max_new_tokens: int
) -> Array:
    """The mask of a prompt, once everything fits."""
    spec, before = runtime.spec, context.tokens.shape[1]
    if input_ids.ndim != 2 or input_ids.dtype != np.int64:  # noqa: PLR2004 - rows and tokens
        raise InputError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; accepted is int64 [batch, tokens]")
    if len(input_ids) != len(context.tokens):
        raise InputError(f"the session has {len(context.tokens)} rows, and input_ids {len(input_ids)}")
    if input_ids.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    # Before a cache is reserved, which for a batch that is too large may be more than there is memory.
    check_size(spec, "input_ids", "batch_size", len(input_ids))
    check_values("input_ids", spec.inputs["input_ids"], input_ids)
    capacity, length = spec.axes["total_sequence_length"].max, before + input_ids.shape[1]
    # The last token is given out, and enters no cache.
    if length + max_new_tokens - 1 > capacity:
        said = f"the prompt has {input_ids.shape[1]} tokens" + (f" behind {before}" if before else "")
        raise InputError(
            f"{said} and {max_new_tokens} are to come; the bundle was exported for {capacity} (--max-sequence-length)"
        )
    mask = np.ones_like(input_ids) if attention_mask is None else np.asarray(attention_mask).astype(np.int64)
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {list(mask.shape)}; accepted is {list(input_ids.shape)}")
    check_values("attention_mask", spec.inputs["attention_mask"], mask)
    if not mask[:, -1].all():
        raise InputError(
            "attention_mask ends in padding; prompts are padded at the left, so that new tokens follow them"
        )
    return mask
