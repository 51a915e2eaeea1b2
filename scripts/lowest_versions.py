"""Print the lower bounds of pyproject.toml as constraints for pip, which `make test-oldest` uses.

It needs only Python, since it runs before anything is installed.
"""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def constraints(pyproject: str) -> list[str]:
    """One line ``name==version`` for each lower bound, including those of the build system and of every extra.

    Args:
        pyproject: text of a pyproject.toml whose requirements are ``name>=version`` or ``name``.
    """
    parsed = tomllib.loads(pyproject)
    project = parsed["project"]
    lists = [parsed["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    # A requirement without a bound has no lowest version to test, so pip chooses.
    return sorted({text.replace(">=", "==") for requirements in lists for text in requirements if ">=" in text})


if __name__ == "__main__":
    print("\n".join(constraints(PYPROJECT.read_text())))
