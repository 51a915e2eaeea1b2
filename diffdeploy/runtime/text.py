"""Text and tokens, by the tokenizer that a model bundle brought along."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError, UnavailableError

__all__ = ["TOKENIZER", "RowText", "TextDecoder", "Tokenizer"]

TOKENIZER = "tokenizer.json"

# What tokenizers put where bytes are no character, or not yet.
_UNFINISHED = "\ufffd"
# A character of UTF-8 has at most four bytes, and a token at least one.
_MOST_BYTES = 4
# Tokens of the prompt in front of new text: its first token may hold a space that is dropped where a text begins.
_NUM_CONTEXT = 5


class Tokenizer:
    """The ``tokenizer.json`` of a bundle, read by the package tokenizers.

    Args:
        bundle: of a model.

    Raises:
        InputError: the bundle has none, one that cannot be read, or that of another model.
        UnavailableError: the package is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        if TOKENIZER not in bundle.manifest.files:
            raise InputError(
                f"{bundle.path} has no {TOKENIZER}, since none was beside its checkpoint; give tokens with --input-ids"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise UnavailableError(
                "text needs the package tokenizers, which is not installed; pip install 'diffdeploy[text]'"
            ) from error
        self._path: Path = bundle.path / TOKENIZER
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:
            raise InputError(f"{self._path} cannot be read as a tokenizer: {str(error).splitlines()[0]}") from error
        values = bundle.manifest.graph.inputs["input_ids"].values
        assert values is not None
        self._vocab_size = values.max + 1
        # Tokens that were added may lie behind the embedding as long as no text has them.
        if (size := self._tokenizer.get_vocab_size(with_added_tokens=False)) > self._vocab_size:
            raise InputError(
                f"{self._path} has {size} tokens, and the embedding of the model {self._vocab_size}: it is the "
                "tokenizer of another model; export again with the right one beside the checkpoint"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text.

        Args:
            text: to be encoded.
            special: put the special tokens around it that the tokenizer puts there.

        Raises:
            InputError: a token is not in the model's embedding.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if odd := [token for token in ids if token >= self._vocab_size]:
            name = self._tokenizer.id_to_token(odd[0])
            raise InputError(
                f"the text has the token {name!r}, which {self._path} gives the number {odd[0]}, and the embedding of "
                f"the model ends at {self._vocab_size - 1}; leave it out"
            )
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class TextDecoder:
    """Text of tokens that come one at a time; each costs the same, however many there were.

    A character comes out with the token that completes it. Joined, what comes out is the text of all tokens.

    Args:
        tokenizer: of the tokens.
        context: tokens in front of the first one, whose text does not come out.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        # A window of tokens: those from `_read` on are new, those before it stand in front of them.
        self._ids = [int(token) for token in context[-_NUM_CONTEXT:]]
        self._read = len(self._ids)
        # How many characters of the window's text are known to the caller.
        self._shown = len(self._decode(self._ids).rstrip(_UNFINISHED))

    def add(self, token: int) -> str:
        """What is certain now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = len(text.rstrip(_UNFINISHED))
        settled = len(self._ids)
        if certain < len(text):
            # No later token can change what stands before the last three: either it is a character, or never will be.
            settled = max(self._read, settled - _MOST_BYTES + 1)
            if settled > self._read:
                certain = max(certain, len(self._decode(self._ids[:settled])))
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if settled > self._read:
            self._slide(settled, num_left=len(text) - self._shown)
        return new

    def _slide(self, settled: int, num_left: int) -> None:
        """Let go what stands before the new tokens, of which so many are settled; they are what stands there now."""
        ahead = self._decode(self._ids[self._read :])
        # Behind a special token, which has no text, a space would be taken for the beginning of a text.
        if ahead:
            self._ids, settled = self._ids[self._read :], settled - self._read
            self._shown = len(ahead) - num_left
        self._read = settled

    def rest(self) -> str:
        """What is left when no token comes any more: bytes that are no character."""
        new = self._decode(self._ids)[self._shown :]
        self._shown += len(new)
        return new


class RowText:
    """Text of one row as its tokens come, which ends before any of some texts.

    Args:
        tokenizer: of the tokens.
        context: tokens of the row so far.
        stops: texts that end the row and are no part of it.

    Attributes:
        stopped: whether one of them has come.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder, self._stops = TextDecoder(tokenizer, context), stops
        self._held = ""
        self.stopped = False

    def add(self, token: int, *, last: bool) -> str:
        """What can be shown with this token.

        Args:
            token: the next one.
            last: whether no other follows, so that nothing has to wait.
        """
        text = self._held + self._decoder.add(token)
        self._held = ""
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text + self._decoder.rest()
        # What may be the beginning of a stop waits for the next token.
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, end: str) -> int:
    """How much of the end of a text is the beginning of another one."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
