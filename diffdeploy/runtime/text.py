"""Text and tokens, by the tokenizer that a model bundle brought along."""

from pathlib import Path
from typing import Any

from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError, UnavailableError

__all__ = ["Tokenizer"]

_FILE = "tokenizer.json"


class Tokenizer:
    """The ``tokenizer.json`` of a bundle, read by the package tokenizers.

    Args:
        bundle: of a model.

    Raises:
        InputError: the bundle has none, or one that cannot be read.
        UnavailableError: the package is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        if _FILE not in bundle.manifest.files:
            raise InputError(
                f"{bundle.path} has no {_FILE}, since none was beside its checkpoint; give tokens with --input-ids"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise UnavailableError(
                "text needs the package tokenizers, which is not installed; pip install 'diffdeploy[text]'"
            ) from error
        path: Path = bundle.path / _FILE
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise InputError(f"{path} cannot be read as a tokenizer: {str(error).splitlines()[0]}") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around it."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
