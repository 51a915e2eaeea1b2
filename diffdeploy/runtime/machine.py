"""Facts about a machine: what compiled artifacts depend on, recorded at export, and its free memory."""

import platform
from pathlib import Path

__all__ = ["differences", "free_bytes", "this_machine"]


def this_machine(device: str) -> dict[str, str]:
    """Versions and instruction sets that machine code compiled here depends on.

    Args:
        device: target device, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    import torch

    facts = {
        "torch": str(torch.__version__),
        # Extension modules load in every patch release of the Python version that they were built for.
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device == "cpu":
        abilities = torch.cpu.get_capabilities()
        # The capabilities include cache sizes and names, which machine code does not depend on.
        facts["isa"] = " ".join(sorted(name for name, able in abilities.items() if able is True))
    else:
        major, minor = torch.cuda.get_device_capability(device)
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    return facts


def differences(made_for: dict[str, str], here: dict[str, str]) -> list[str]:
    """Describe the differences between the machine that an artifact was made for and this one.

    A processor may have more instruction sets than the artifact needs, but not fewer.
    """
    found = []
    for name, there in made_for.items():
        if name == "isa":
            if missing := sorted(set(there.split()) - set(here.get("isa", "").split())):
                found.append(f"a processor with {', '.join(missing)}, which this one lacks")
        elif here.get(name) != there:
            found.append(f"{name} {there}, but this machine has {here.get(name, 'none')}")
    return found


def free_bytes(device: str, *, swap: bool = False) -> int:
    """Free memory for a run: that of the device, or of this machine within the limit of the process's control group.

    Args:
        device: ``cpu`` or ``cuda``.
        swap: true to count free swap space, too.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    free += int(fields["SwapFree"].split()[0]) * 1024 if swap else 0
    group = Path("/sys/fs/cgroup")
    try:
        # In a container, this process may not use all free memory of the machine.
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # The page cache is counted as used, but released when memory is needed.
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(counted["active_file"]) + int(counted["inactive_file"])
        return min(free, limit - used)
    except (OSError, ValueError, KeyError):  # no control group, or one without a limit
        return free
