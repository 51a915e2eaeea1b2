"""Pages that are created when the documentation is built: from the commands, the packages, and files at the root.

mkdocs calls the functions whose names begin with `on_`.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]

# Files at the root that also become pages, by the path of the page.
AT_THE_ROOT = {
    "contributing.md": "CONTRIBUTING.md",
    "architecture.md": "ARCHITECTURE.md",
    "release.md": "RELEASE.md",
    "vulnerabilities.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}

# Pages about Python, with the packages and modules whose public names each of them describes.
PYTHON = {
    "api.md": ["diffdeploy", "diffdeploy.errors"],
    "api-blocks.md": ["diffdeploy.config", "diffdeploy.modules", "diffdeploy.ops", "diffdeploy.compat"],
    "api-checkpoints.md": ["diffdeploy.checkpoints", "diffdeploy.checkpoints.layouts"],
    "api-export.md": ["diffdeploy.exporters", "diffdeploy.formats", "diffdeploy.graphs", "diffdeploy.bundle"],
    "api-runtime.md": ["diffdeploy.runtime", *(f"diffdeploy.runtime.{name}" for name in ("session", "text", "chat"))],
    "api-verify.md": ["diffdeploy.verify", "diffdeploy.locate", "diffdeploy.selftest"],
    "api-bench.md": ["diffdeploy.bench", "diffdeploy.bench.models"],
    "api-engines.md": [
        "diffdeploy.engines",
        "diffdeploy.engines.verification",
        "diffdeploy.engines.oip",
        "diffdeploy.engines.triton",
        "diffdeploy.integrations.transformers",
    ],
}

# Packages whose public names are imported only within the package that contains them.
INSIDE = {
    *(f"diffdeploy.formats.{name}" for name in ("aoti", "compile", "flash2", "onnx", "pt2")),
    *(f"diffdeploy.selftest.{name}" for name in ("blocks", "legal", "models")),
}


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are not files in docs/."""
    from mkdocs.structure.files import File

    pages = {"cli.md": cli_page()}
    pages |= {page: python_page(page) for page in PYTHON}
    pages |= {page: root_page(page) for page in AT_THE_ROOT}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Keep options and file names in code from being broken at their hyphens and slashes."""
    return re.sub(r"<code>([^<]+)</code>", lambda code: f"<code>{_unbroken(code[1])}</code>", html)


def _unbroken(code: str) -> str:
    return re.sub(
        r"\S*[-/]\S*", lambda word: word[0] if len(word[0]) > 40 else f'<span class="word">{word[0]}</span>', code
    )


def cli_page() -> str:
    """Every command with its arguments and options, in the format that typer writes."""
    command = [sys.executable, "-m", "typer", "diffdeploy.cli.main", "utils", "docs", "--name", "diffdeploy"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # The list of commands is removed, since typer truncates it; the table of contents has them.
    text = re.sub(r"\*\*Commands\*\*:.*?(?=^## )", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
    return text.replace("# `diffdeploy`\n", "# Command line\n", 1)


def python_page(page: str) -> str:
    """The public names of the page's packages; a name that several modules export is described under the first."""
    topic = page.removesuffix(".md").partition("-")[2]
    sections = [f"# Python API: {topic}" if topic else "# Python API"]
    for module in PYTHON[page]:
        sections.append(f"## `{module}`\n\n{_about(module)}")
        for name in public_names(module):
            first = _described_at(home(module, name))
            if first == f"{module}.{name}":
                sections.append(f"::: {first}\n    options:\n      heading_level: 3")
            else:
                sections.append(f"`{name}` is [`{first}`][].")
    return "\n\n".join(sections)


def public_names(module: str) -> list[str]:
    """Names in ``__all__`` of a module."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    return []


@cache
def home(module: str, name: str) -> str:
    """The full name of an object in the module that defines it."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return home(node.module or "", name)
    return f"{module}.{name}"


@cache
def _described_at(target: str) -> str:
    modules = [module for page in PYTHON.values() for module in page]
    return next(f"{m}.{name}" for m in modules for name in public_names(m) if home(m, name) == target)


def _about(module: str) -> str:
    return (ast.get_docstring(_tree(module)) or "").replace("``", "`")


@cache
def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def root_page(page: str) -> str:
    """A file at the root, with its links adapted to the pages."""
    text = (ROOT / AT_THE_ROOT[page]).read_text()
    for path, source in AT_THE_ROOT.items():
        text = text.replace(f"]({source}", f"]({path}")
    return text.replace("](docs/", "](")
