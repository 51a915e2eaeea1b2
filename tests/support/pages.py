"""Fenced blocks of Markdown pages, and the commands in them and between backticks."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

# Pages of figures that scripts write; the commands in them are measurements.
GENERATED = {"benchmarks.md", "faults.md", "runtime-versions.md", "operator-speed.md"}

_FENCE = re.compile(r"^ *```(\w*)$")
_REASON = re.compile(r"^ *<!-- not run: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: word after the opening fence.
        code: its lines.
        line: number of the first of these lines in the page.
        not_run: reason why the block is not run; ``None`` if it is run.
    """

    language: str
    code: str
    line: int
    not_run: str | None


def pages() -> list[Path]:
    """All pages that users and contributors read, except for the changelog, which names what no longer exists."""
    found = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if page.name != "CHANGELOG.md"]


def written_pages() -> list[Path]:
    """The pages that people write."""
    return [page for page in pages() if page.name not in GENERATED]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines, inside, reason = page.read_text().splitlines(), None, None
    for number, line in enumerate(lines):
        if fence := _FENCE.match(line):
            if inside is None:
                inside = (fence[1], number + 1)
            else:
                language, start = inside
                found.append(Block(language, "\n".join(lines[start:number]), start + 1, reason))
                inside, reason = None, None
        elif inside is None and (match := _REASON.match(line)):
            reason = match[1]
    assert inside is None, f"{page}: a fence is not closed"
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block: in console blocks, the lines after ``$``; in others, all. Long ones are joined."""
    joined = block.code.replace("\\\n", " ")
    lines = joined.splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def shown_calls(page: Path) -> Iterator[list[str]]:
    """The arguments of each call of ``diffdeploy`` in a fenced block."""
    fenced = [line for block in blocks(page) if block.language in ("sh", "console") for line in commands(block)]
    return _arguments(fenced)


def named_calls(page: Path) -> Iterator[list[str]]:
    """The arguments of each call between backticks, which may leave out what is required."""
    return _arguments(re.findall(r"`(diffdeploy [^`]*)`", _without_fences(page).replace("\n", " ")))


def indented_commands(page: Path) -> list[list[str]]:
    """The words of each line that is indented as code and begins with a command."""
    lines = re.findall(r"^    ((?:diffdeploy|python3?|pip|make|npm) .*)$", _without_fences(page), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def _without_fences(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _arguments(lines: list[str]) -> Iterator[list[str]]:
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "diffdeploy":
            yield words[1:]
