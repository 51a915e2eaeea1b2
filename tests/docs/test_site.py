"""What the site is made from: every public name, and the check of what was built."""

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

HOOKS: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))
CHECK: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "check_site.py"))


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs refuses a page that is not; this needs no mkdocs."""
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    made = {"cli.md", *HOOKS["PYTHON"], *HOOKS["AT_THE_ROOT"]}
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(written | made)


def test_every_public_name_has_a_place() -> None:
    described = {module for modules in HOOKS["PYTHON"].values() for module in modules}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    public = {package for package in packages if HOOKS["public_names"](package)}
    assert public <= described | HOOKS["INSIDE"]
    assert not described & HOOKS["INSIDE"]
    text = "".join(HOOKS["python_page"](page) for page in HOOKS["PYTHON"])
    for module in described:
        for name in HOOKS["public_names"](module):
            assert f"::: {module}.{name}\n" in text or f"`{name}` is [`diffdeploy." in text


def test_a_name_that_two_packages_have_is_described_once() -> None:
    assert HOOKS["home"]("diffdeploy.exporters", "ExportOptions") == "diffdeploy.formats.options.ExportOptions"
    pages = "".join(HOOKS["python_page"](page) for page in HOOKS["PYTHON"])
    assert pages.count("::: diffdeploy.CheckpointOptions\n") == 1
    assert "::: diffdeploy.checkpoints.CheckpointOptions\n" not in pages
    assert "`CheckpointOptions` is [`diffdeploy.CheckpointOptions`][]." in pages


@pytest.mark.parametrize("page", HOOKS["AT_THE_ROOT"])
def test_links_of_files_at_the_root_lead_to_pages(page: str) -> None:
    text = HOOKS["root_page"](page)
    assert "](docs/" not in text
    assert not [source for source in HOOKS["AT_THE_ROOT"].values() if f"]({source}" in text]


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="gone.html">', "index.html links to gone.html, which is not there"),
        ('<a href="other.html#gone">', "index.html links to other.html#gone, a place that is not on that page"),
        ('<script src="https://elsewhere/x.js">', "index.html loads https://elsewhere/x.js"),
        ('<img src="gone.png">', "index.html links to gone.png, which is not there"),
        ('<a href="other.html#here"><a href="https://elsewhere"><a href="#">', None),
    ],
)
def test_what_is_wrong_with_a_built_site_is_found(html: str, problem: str | None, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(html)
    (tmp_path / "other.html").write_text('<h1 id="here">')
    assert CHECK["problems"](tmp_path) == ([problem] if problem else [])


def test_styles_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text('a { background: url("//elsewhere/a.png"), url(b.png) }')
    assert CHECK["problems"](tmp_path) == ["a.css loads //elsewhere/a.png"]
