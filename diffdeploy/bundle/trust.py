"""Record of the bundles that this user exported on this machine, by digest, in the user's state directory.

A format that runs code when it is loaded requires such a record, or the user's consent. The digest is that of the
manifest, which contains the digests of all other files. It identifies local exports, and proves nothing to others.
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
# Number of latest digests that are kept: more exports than anybody makes in a year.
_MOST = 10_000


def _record() -> Path | None:
    """File with one digest per line, in the directory that the XDG base directory specification defines."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():  # the specification says to ignore relative paths
        return given / "diffdeploy" / _FILE
    try:
        return Path.home() / ".local" / "state" / "diffdeploy" / _FILE
    except RuntimeError:  # a user without a home directory
        return None


def _digests() -> list[str]:
    record = _record()
    with suppress(OSError):
        if record is not None:
            # An incomplete or manipulated line does not count.
            lines = record.read_text(encoding="ascii", errors="replace").splitlines()
            return [line for line in lines if _DIGEST.fullmatch(line)]
    return []


def remember_export(directory: Path) -> None:
    """Record the digest of a bundle that was just exported; if that is impossible, loading it requires consent."""
    record, digest = _record(), file_sha256(directory / MANIFEST)
    if record is None:
        return
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if len(known := _digests()) >= 2 * _MOST:
            # Replaced in one rename, so that a concurrent reader sees the old file or the new one.
            shorter = record.with_name(f"{_FILE}.{os.getpid()}")
            shorter.write_text("".join(f"{each}\n" for each in known[-_MOST:]), encoding="ascii")
            shorter.replace(record)
        # One short write at the end of the file, which concurrent exports do not interleave.
        with record.open("ab") as file:
            file.write(f"{digest}\n".encode())


def is_own_export(directory: Path) -> bool:
    """True if this user exported the bundle, as it is now, on this machine."""
    return file_sha256(directory / MANIFEST) in _digests()
