"""Tokens that begin, end and fill texts, as the files of a model beside its weights say."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffdeploy.bundle.manifest import Manifest
from diffdeploy.errors import InputError

__all__ = ["SpecialTokens", "special_tokens"]

_FILES = ("generation_config.json", "config.json")


class SpecialTokens(NamedTuple):
    """Numbers of tokens.

    Attributes:
        begin: what a text begins with, if anything.
        end: what ends a text; empty where nothing does.
        fill: what rows that have ended are filled with: by default the first that ends a text, or 0.
    """

    begin: int | None
    end: tuple[int, ...]
    fill: int


def special_tokens(directory: Path, manifest: Manifest) -> SpecialTokens:
    """Those of ``generation_config.json``, else of ``config.json``, else of the class that the manifest names.

    Args:
        directory: of a bundle.
        manifest: its manifest.

    Raises:
        InputError: a file does not say it in numbers.
    """
    begin, fill = _numbers(directory, "bos_token_id"), _numbers(directory, "pad_token_id")
    end = _numbers(directory, "eos_token_id")
    default = manifest.provenance.defaults.get("eos_token_id")
    if not end and default is not None:
        end = (int(default.split()[0]),)
    return SpecialTokens(begin[0] if begin else None, end, [*fill, *end, 0][0])


def _numbers(directory: Path, name: str) -> tuple[int, ...]:
    for file in _FILES:
        path = directory / file
        if not path.is_file():
            continue
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8")).get(name)
            if found is not None:
                return tuple(int(token) for token in (found if isinstance(found, list) else [found]))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} has no number or list of numbers for {name}; correct the file, or leave it out"
            ) from error
    return ()
