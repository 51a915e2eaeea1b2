"""Tokens that begin, end and pad texts, according to the files that come with a model's weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffdeploy.bundle.manifest import Manifest
from diffdeploy.errors import InputError

__all__ = ["SpecialTokens", "special_tokens"]

_FILES = ("generation_config.json", "config.json")


class SpecialTokens(NamedTuple):
    """Ids of special tokens.

    Attributes:
        begin: token that begins a text, if any.
        end: tokens that end a text; empty if there are none.
        fill: token that pads finished rows: by default the first that ends a text, or 0.
    """

    begin: int | None
    end: tuple[int, ...]
    fill: int


def special_tokens(directory: Path, manifest: Manifest) -> SpecialTokens:
    """Read the special tokens from ``generation_config.json``, ``config.json`` or the defaults in the manifest.

    Args:
        directory: directory of a bundle.
        manifest: its manifest.

    Raises:
        InputError: a file does not state them as numbers.
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
                f"{path} has no number or list of numbers for {name}; correct the file, or remove the field"
            ) from error
    return ()
