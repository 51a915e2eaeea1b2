"""The architecture, checked from the source: import direction and the list of packages."""

import ast
import tomllib
from pathlib import Path

from tests.support.paths import ROOT

FLOORS = [
    "errors",
    "digests",
    "arrays",
    "array_files",
    "config",
    "exact",
    "ops",
    "modules",
    "compat",
    "checkpoints",
    "graphs",
    "bundle",
    "runtime",
    "verify",
    "bench",
]
ROOMS = [*FLOORS, "exporters", "cli"]


def sources() -> list[tuple[str, Path]]:
    files = [
        (path.relative_to(ROOT / "diffdeploy").parts[0].removesuffix(".py"), path)
        for path in (ROOT / "diffdeploy").rglob("*.py")
        if path.relative_to(ROOT / "diffdeploy").parts[0] not in ("exporters", "cli", "__init__.py")
    ]
    return files + [(room, path) for room in ("exporters", "cli") for path in (ROOT / room).rglob("*.py")]


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names if module == "diffdeploy"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == "diffdeploy" and len(parts) > 1}


def test_imports_point_down() -> None:
    checked = 0
    for room, path in sources():
        for other in imported_rooms(path) & set(ROOMS):
            checked += 1
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.relative_to(ROOT)} imports diffdeploy.{other}"
    assert checked > 20


def test_packages_list_names_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = []
    for base in ("diffdeploy", "exporters", "cli"):
        for path in (ROOT / base).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / base).parts
            found.append(".".join(("diffdeploy", *(() if base == "diffdeploy" else (base,)), *inside)))
    assert sorted(listed) == sorted(found)
