"""What an artifact says of itself, and its contract, where the artifact may be damaged."""

from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.errors import DiffDeployError
from diffdeploy.formats import ArtifactFacts, Check, Format, require_format
from diffdeploy.formats.checks import declared_facts, make_check

__all__ = ["artifact_checks", "artifact_facts"]


def artifact_facts(bundle: Bundle) -> ArtifactFacts:
    """What the artifact says of itself; where it cannot be read, what the manifest says.

    Raises:
        InputError: the format is not known.
    """
    found = require_format(bundle.manifest.format)
    try:
        return found.facts(bundle)
    except (DiffDeployError, MemoryError):  # our own errors say more, and a lack of memory is no damage
        raise
    except Exception:  # noqa: BLE001 - whatever a library raises at a damaged file; `artifact_checks` says what
        return declared_facts(bundle, attention_ops=0)


def artifact_checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """Check the artifact's structure against the bundle's manifest and weights.

    Args:
        bundle: an opened bundle.
        weights: canonical weights in the artifact's dtype.

    Raises:
        InputError: the format is not known.
    """
    found = require_format(bundle.manifest.format)
    try:
        return [*found.contract(bundle, weights), *_engine_files(found, bundle)]
    except (DiffDeployError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a library raises at a damaged artifact is the finding
        # The first line: what libraries add below it is for their own developers.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [Check(name="readable", passed=False, detail=f"the artifact cannot be read: {reason}")]


def _engine_files(found: Format, bundle: Bundle) -> list[Check]:
    """Whether the files for engines say of the artifact what the manifest says; earlier bundles have none."""
    files = bundle.manifest.files.keys()
    expected = {n: text for n, text in found.engine_files(bundle.manifest, bundle.path).items() if n in files}
    wrong = [f"{name} is not that of this bundle" for name, text in expected.items()
             if (bundle.path / name).read_bytes() != text]  # fmt: skip
    return [make_check("engine files", wrong, ", ".join(expected))] if expected else []
