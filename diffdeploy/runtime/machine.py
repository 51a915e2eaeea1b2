"""Facts about a machine that compiled artifacts depend on, recorded at export and compared before loading."""

import platform

__all__ = ["differences", "this_machine"]


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
