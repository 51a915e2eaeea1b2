"""Which bundles this user's own exports made on this machine: remembered by digest in the user's state directory.

A format that runs code when it is loaded asks for this, or for the user's word. The digest is that of the manifest,
which holds those of all other files; it tells what was made here, and says nothing to anybody else.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from diffdeploy.bundle.store import MANIFEST
from diffdeploy.files import file_sha256

__all__ = ["is_own_export", "remember_export"]

_FILE = "own-exports"
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Of digests that are kept, the latest: as many exports as nobody makes in a year.
_MOST = 10_000


def _record() -> Path | None:
    """The file with one digest a line, in the directory that the XDG base directory specification names."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():  # the specification has relative ones ignored
        return given / "diffdeploy" / _FILE
    try:
        return Path.home() / ".local" / "state" / "diffdeploy" / _FILE
    except RuntimeError:  # a user without a home
        return None


def _digests() -> list[str]:
    record = _record()
    with suppress(OSError):
        if record is not None:
            # A line that was torn or tampered with is none.
            lines = record.read_text(encoding="ascii", errors="replace").splitlines()
            return [line for line in lines if _DIGEST.fullmatch(line)]
    return []


def remember_export(directory: Path) -> None:
    """Keep the digest of a bundle that was just exported; where nothing can be kept, loading it asks for trust."""
    record, digest = _record(), file_sha256(directory / MANIFEST)
    if record is None:
        return
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if len(known := _digests()) >= 2 * _MOST:
            # In one rename, so that whoever reads at the same time has the old file or the new one.
            shorter = record.with_name(f"{_FILE}.{os.getpid()}")
            shorter.write_text("".join(f"{each}\n" for each in known[-_MOST:]), encoding="ascii")
            shorter.replace(record)
        # One short write at the end of the file, which exports that run side by side do not tear.
        with record.open("ab") as file:
            file.write(f"{digest}\n".encode())


def is_own_export(directory: Path) -> bool:
    """Whether an export of this user on this machine made the bundle as it is now."""
    return file_sha256(directory / MANIFEST) in _digests()
