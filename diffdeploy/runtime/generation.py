"""Token-by-token generation with a model bundle and a cache, for every format.

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
    """Interface of Hugging Face's streamers: `put` takes the prompt ``[B, S]`` and then tokens ``[B]``."""

    def put(self, value: Any) -> None:
        """Receive tokens."""
        ...

    def end(self) -> None:
        """Signal that no more tokens follow."""
        ...


def eos_of(bundle: Bundle) -> tuple[int, ...]:
    """Tokens that end a text; see `diffdeploy.bundle.special_tokens`.

    Raises:
        InputError: a file does not state them as numbers.
    """
    return special_tokens(bundle.path, bundle.manifest).end


class GenerationOptions(TypedDict, total=False):
    """Options for choosing tokens and ending rows; see `Sampling` for the first six.

    Attributes:
        do_sample: true to draw tokens, false to take the most probable ones.
        temperature: divisor of the logits.
        top_k: number of most probable tokens to draw from.
        top_p: total probability of the most probable tokens to draw from.
        repetition_penalty: penalty for tokens that already occur, except padding.
        seed: random seed for the draws.
        eos_token_id: tokens that end a row; by default the model's own, see `eos_of`; ``None`` for none.
        pad_token_id: token that fills rows after their end; by default the first of ``eos_token_id``, or 0.
        min_new_tokens: minimum number of new tokens before one of ``eos_token_id`` may end a row.
        stop: texts that end a row. Their tokens are the last ones of the row, but its text ends before them.
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
    """One new token for each row.

    Attributes:
        tokens: token ids ``[B]``, int64.
        texts: new text of each row that is ready for display; ``None`` if the bundle has no tokenizer.
    """

    tokens: Array
    texts: tuple[str, ...] | None


@dataclass
class Context:
    """The tokens of each row so far, and the cache with which the model continues them.

    Attributes:
        tokens: token ids ``[B, T]``, int64.
        mask: mask ``[B, T]``, int64, 0 for padding.
        filling: boolean ``[B, T]``, true for tokens that fill rows after their end.
        decoding: cache of the tokens so far, except for the last chosen token, which the model has not seen.
    """

    tokens: Array
    mask: Array
    filling: Array
    decoding: Decoding

    @classmethod
    def empty(cls, runtime: "Runtime", batch: int) -> Self:
        """Create a context without tokens."""
        nothing = np.zeros((batch, 0), np.int64)
        return cls(nothing, nothing, nothing.astype(bool), Decoding(runtime, batch))

    def extended(self, input_ids: Array, mask: Array) -> tuple[Array, Array, Array]:
        """Tokens, mask and filling after appending a prompt; the filling of rows that ended becomes padding."""
        return (
            np.concatenate((self.tokens, input_ids), axis=1),
            np.concatenate((np.where(self.filling, 0, self.mask), mask), axis=1),
            np.concatenate((self.filling, np.zeros(input_ids.shape, bool)), axis=1),
        )


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """Conditions that end rows: see `GenerationOptions`."""

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
            raise InputError("stop contains an empty text, which would end every row; omit it")
        for name, number, smallest in (("max_new_tokens", max_new_tokens, 1), ("min_new_tokens", least, 0)):
            if number < smallest:
                raise InputError(f"{name} is {number}; accepted: {smallest} or more")
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
    """Generate new tokens for all rows, step by step, until every row has ended or the limit is reached.

    Args:
        runtime: runtime of a model.
        context: earlier tokens, which each step extends.
        input_ids: prompts ``[B, S]``, int64, padded on the left.
        attention_mask: mask ``[B, S]``, 0 for padding; ``None`` for no padding.
        max_new_tokens: maximum number of new tokens.
        with_text: true to return texts.
        options: see `GenerationOptions`.

    Raises:
        InputError: tokens, the mask, lengths or an option are invalid, or a text is requested without a tokenizer. The
            context is then unchanged.
        UnavailableError: a text is requested, but the package tokenizers is not installed.
    """
    if unknown := sorted(options.keys() - GenerationOptions.__annotations__.keys()):
        raise InputError(f"{unknown[0]} is not an option; accepted: {', '.join(GenerationOptions.__annotations__)}")
    sampling = Sampling(**{name: value for name, value in options.items() if name not in _OF_ROWS})  # type: ignore[arg-type]
    ends = _Ends.of(runtime.bundle, max_new_tokens, options)
    # Checked now, since a generator would do it only when the first token is requested.
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
    # The last token is returned, but not added to the cache.
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
    """Tokens of the vocabulary that occur in each row, ``[B, V]``; padding does not count."""
    vocab_size = runtime.spec.outputs[runtime.spec.main_output].shape[-1]
    seen = np.zeros((len(tokens), int(vocab_size)), bool)
    rows, columns = np.nonzero(mask)
    seen[rows, tokens[rows, columns]] = True
    return seen


def _checked(
    runtime: "Runtime", context: Context, input_ids: Array, attention_mask: Array | None, max_new_tokens: int
) -> Array:
    """Check a prompt and return its mask."""
    spec, before = runtime.spec, context.tokens.shape[1]
    if input_ids.ndim != 2 or input_ids.dtype != np.int64:  # noqa: PLR2004 - rows and tokens
        raise InputError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; accepted: int64 [batch, tokens]")
    if len(input_ids) != len(context.tokens):
        raise InputError(f"the session has {len(context.tokens)} rows, but input_ids has {len(input_ids)}")
    if input_ids.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    # Checked before a cache is reserved, which may not fit into memory if the batch is too large.
    check_size(spec, "input_ids", "batch_size", len(input_ids))
    check_values("input_ids", spec.inputs["input_ids"], input_ids)
    capacity, length = spec.axes["total_sequence_length"].max, before + input_ids.shape[1]
    # The last token is returned, but not added to the cache.
    if length + max_new_tokens - 1 > capacity:
        said = f"the prompt has {input_ids.shape[1]} tokens" + (f" after {before} earlier ones" if before else "")
        raise InputError(
            f"{said} and {max_new_tokens} will follow; the bundle was exported for {capacity} tokens "
            "(--max-sequence-length)"
        )
    mask = np.ones_like(input_ids) if attention_mask is None else np.asarray(attention_mask).astype(np.int64)
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {list(mask.shape)}; accepted: {list(input_ids.shape)}")
    check_values("attention_mask", spec.inputs["attention_mask"], mask)
    if not mask[:, -1].all():
        raise InputError("attention_mask ends in padding; pad prompts on the left, so that new tokens follow them")
    return mask
