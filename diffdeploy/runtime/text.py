"""Conversion between text and tokens, with the tokenizer that came with a model bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError, UnavailableError

__all__ = ["TOKENIZER", "RowText", "TextDecoder", "Tokenizer"]

TOKENIZER = "tokenizer.json"

# Character that tokenizers return for bytes that are not, or not yet, a character.
_UNFINISHED = "\ufffd"
# A UTF-8 character has at most four bytes, and a token at least one.
_MOST_BYTES = 4
# Number of prompt tokens that are decoded before the new ones: at the start of a text, tokenizers may drop a space.
_NUM_CONTEXT = 5


class Tokenizer:
    """The ``tokenizer.json`` of a bundle, read by the package tokenizers.

    Args:
        bundle: bundle of a model.

    Raises:
        InputError: the bundle has no tokenizer, an unreadable one, or that of another model.
        UnavailableError: the package is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        if TOKENIZER not in bundle.manifest.files:
            raise InputError(
                f"{bundle.path} has no {TOKENIZER}, since its checkpoint came without one; give tokens with --input-ids"
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
        # Added tokens may exceed the embedding if no text contains them.
        if (size := self._tokenizer.get_vocab_size(with_added_tokens=False)) > self._vocab_size:
            raise InputError(
                f"{self._path} has {size} tokens, but the embedding of the model has {self._vocab_size}: it is the "
                "tokenizer of another model; export again with the correct one next to the checkpoint"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text to tokens.

        Args:
            text: text to encode.
            special: true to add the special tokens that the tokenizer adds around a text.

        Raises:
            InputError: a token is not in the model's embedding.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if odd := [token for token in ids if token >= self._vocab_size]:
            name = self._tokenizer.id_to_token(odd[0])
            raise InputError(
                f"the text contains the token {name!r}, which has the id {odd[0]} in {self._path}, but the "
                f"embedding of the model ends at {self._vocab_size - 1}; remove it"
            )
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens to text without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class TextDecoder:
    """Decoder for tokens that arrive one at a time, at a constant cost per token.

    A character is returned with the token that completes it. The joined parts are the text of all tokens.

    Args:
        tokenizer: tokenizer of the tokens.
        context: tokens before the first one, whose text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        # A window of tokens: those from `_read` on are new, and those before it are their context.
        self._ids = [int(token) for token in context[-_NUM_CONTEXT:]]
        self._read = len(self._ids)
        # Number of characters of the window's text that the caller already has.
        self._shown = len(self._decode(self._ids).rstrip(_UNFINISHED))

    def add(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = len(text.rstrip(_UNFINISHED))
        settled = len(self._ids)
        if certain < len(text):
            # Later tokens cannot complete a character that began before the last three tokens, so that text is final.
            settled = max(self._read, settled - _MOST_BYTES + 1)
            if settled > self._read:
                certain = max(certain, len(self._decode(self._ids[:settled])))
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if settled > self._read:
            self._slide(settled, num_left=len(text) - self._shown)
        return new

    def _slide(self, settled: int, num_left: int) -> None:
        """Drop the context, and turn the new tokens up to index ``settled`` into the context of later ones."""
        ahead = self._decode(self._ids[self._read :])
        # Special tokens have no text; with no other context, a space would be dropped as at the start of a text.
        if ahead:
            self._ids, settled = self._ids[self._read :], settled - self._read
            self._shown = len(ahead) - num_left
        self._read = settled

    def rest(self) -> str:
        """Return the remaining text at the end: bytes that do not form a character."""
        new = self._decode(self._ids)[self._shown :]
        self._shown += len(new)
        return new


class RowText:
    """Text of one row as its tokens arrive, which ends before the first of several stop texts.

    Args:
        tokenizer: tokenizer of the tokens.
        context: tokens of the row so far.
        stops: texts that end the row and are not part of it.

    Attributes:
        stopped: true once one of the stop texts has occurred.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder, self._stops = TextDecoder(tokenizer, context), stops
        self._held = ""
        self.stopped = False

    def add(self, token: int, *, last: bool) -> str:
        """Add a token and return the text that can be shown.

        Args:
            token: the next token.
            last: true if no other token follows, so that no text has to be held back.
        """
        text = self._held + self._decoder.add(token)
        self._held = ""
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text + self._decoder.rest()
        # Text that may begin a stop text is held back until the next token.
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, end: str) -> int:
    """Length of the longest suffix of a text that is a prefix of another one."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
