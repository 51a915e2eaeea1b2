"""Memory of another process."""

import subprocess
from pathlib import Path

__all__ = ["resident_kib"]


def resident_kib(process: subprocess.Popen[bytes], *, peak: bool = False) -> int:
    """Resident size of a process, now or at its peak, in KiB."""
    field = "VmHWM" if peak else "VmRSS"
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
