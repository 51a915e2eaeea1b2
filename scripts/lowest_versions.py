"""The lower bounds of pyproject.toml as constraints of pip, on standard output; `make test-oldest` installs by them.

It needs nothing but Python, since it runs before anything is installed.
"""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def constraints(pyproject: str) -> list[str]:
    """One line ``name==version`` for each lower bound, of the build system and of every extra too.

    Args:
        pyproject: the text of a pyproject.toml whose requirements are ``name>=version`` or ``name``.
    """
    parsed = tomllib.loads(pyproject)
    project = parsed["project"]
    lists = [parsed["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    # A requirement without a bound takes whatever pip finds: there is no lowest version to try.
    return sorted({text.replace(">=", "==") for requirements in lists for text in requirements if ">=" in text})


if __name__ == "__main__":
    print("\n".join(constraints(PYPROJECT.read_text())))
