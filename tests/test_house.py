"""The architecture, checked from the source: import direction and the list of packages."""

import ast
import tokenize
import tomllib
from pathlib import Path

from diffdeploy.formats import export_targets, format_names
from diffdeploy.ops import Impl
from tests.support.paths import ROOT

FLOORS = [
    "errors",
    "arrays",
    "files",
    "staging",
    "records",
    "versions",
    "exclusive",
    "processes",
    "toolchain",
    "config",
    "exact",
    "ops",
    "modules",
    "compat",
    "checkpoints",
    "graphs",
    "bundle",
    "budgets",
    "formats",
    "runtime",
    "locate",
    "verify",
    "exporters",
    "selftest",
    "bench",
    "integrations",
    "engines",
    "cli",
    "__main__",
]
ROOMS = FLOORS
# Of a line; where a reader would ask why.
LEAST_COMMENTS = 0.03


def sources() -> list[tuple[str, Path]]:
    files = [
        (path.relative_to(ROOT / "diffdeploy").parts[0].removesuffix(".py"), path)
        for path in (ROOT / "diffdeploy").rglob("*.py")
        if path.relative_to(ROOT / "diffdeploy").parts[0] not in ("exporters", "cli", "__init__.py")
    ]
    return files + [(room, path) for room in ("exporters", "cli") for path in (ROOT / room).rglob("*.py")]


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(_without_lowering(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names if module == "diffdeploy"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == "diffdeploy" and len(parts) > 1}


def _without_lowering(path: Path) -> ast.Module:
    """The module without the one import that points up: a format hands `lower` on to its own exporter."""
    tree = ast.parse(path.read_text())
    if path.name == "format.py" and path.parent.parent.name == "formats":
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "lower":
                own = f"diffdeploy.exporters.{path.parent.name}"
                node.body = [s for s in node.body if not (isinstance(s, ast.ImportFrom) and s.module == own)]
    return tree


def test_imports_point_down() -> None:
    checked = 0
    for room, path in sources():
        for other in imported_rooms(path) & set(ROOMS):
            checked += 1
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.relative_to(ROOT)} imports diffdeploy.{other}"
    assert checked > 20


# Where a format's name may stand outside its own room, and why.
NAMED = {
    ("diffdeploy/formats/options.py", "onnx"): "the default of --format",
    ("cli/export.py", "onnx"): "the default of --format",
    ("cli/main.py", "onnx"): "the package of that name",
    **{("diffdeploy/formats/rows.py", name): "the registry" for name in format_names()},
}


def test_no_format_is_named_outside_its_room() -> None:
    names = {*format_names(), *export_targets()}
    for _, path in sources():
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names and (where, node.value) not in NAMED:
                own_room = [f"diffdeploy/formats/{node.value}/", f"exporters/{node.value}"]
                own_room += ["diffdeploy/ops/"] if node.value in list(Impl) else []  # an implementation of that name
                assert where.startswith(tuple(own_room)), f"{where}:{node.lineno} names the format {node.value!r}"


def test_packages_list_names_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = []
    for base in ("diffdeploy", "exporters", "cli"):
        for path in (ROOT / base).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / base).parts
            found.append(".".join(("diffdeploy", *(() if base == "diffdeploy" else (base,)), *inside)))
    assert sorted(listed) == sorted(found)


def package_files() -> list[Path]:
    return [path for _, path in sources()] + [ROOT / "diffdeploy" / "__init__.py"]


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): count for path in package_files() if (count := _lines(path)) > 350}
    assert not long


def test_functions_are_short() -> None:
    """Without signatures and docstrings, which say to users of commands and of the library what each argument does."""
    long = {}
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1
                if length > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert not long


def test_comments_say_why() -> None:
    comments = lines = 0
    for path in package_files():
        lines += _lines(path)
        with path.open("rb") as file:
            comments += sum(
                token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type: ignore"))
                for token in tokenize.tokenize(file.readline)
            )
    assert comments / lines >= LEAST_COMMENTS


def _lines(path: Path) -> int:
    return path.read_text().count("\n")
