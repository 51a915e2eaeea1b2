"""Lookup of Hugging Face hub names in the local cache of this machine; nothing is downloaded."""

import re
from pathlib import Path

from diffdeploy.errors import InputError

__all__ = ["in_local_cache"]

# Names of an owner and a repository consist of letters, digits, dots, dashes and underscores.
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def in_local_cache(path: Path) -> Path | None:
    """Directory of the repository that a path names; ``None`` if the path exists or is not such a name.

    Raises:
        InputError: the cache does not contain the repository, or the package that reads the cache is not installed.
    """
    name = path.as_posix()
    if path.exists() or path.suffix in (".safetensors", ".pt", ".pth", ".bin") or not _ID.fullmatch(name):
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(
            f"{name} does not exist; give a .safetensors or .pt file, or a directory with one, or pip install "
            "'diffdeploy[hf]' to look it up in the local cache of the Hugging Face hub"
        ) from error
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name} does not exist here, and the local cache of the Hugging Face hub does not have it; run "
            f"hf download {name}, or give a .safetensors or .pt file, or a directory with one"
        ) from error
