"""Facts and contract checks of an artifact that may be damaged."""

from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.errors import DiffDeployError
from diffdeploy.formats import ArtifactFacts, Check, Format, require_format
from diffdeploy.formats.checks import declared_facts, make_check

__all__ = ["artifact_checks", "artifact_facts"]


def artifact_facts(bundle: Bundle) -> ArtifactFacts:
    """Facts read from the artifact, or from the manifest if the artifact cannot be read.

    Raises:
        InputError: the format is unknown.
    """
    found = require_format(bundle.manifest.format)
    try:
        return found.facts(bundle)
    except (DiffDeployError, MemoryError):  # our own errors are more specific, and running out of memory is not damage
        raise
    except Exception:  # noqa: BLE001 - libraries raise any error for a damaged file; `artifact_checks` reports it
        return declared_facts(bundle, attention_ops=0)


def artifact_checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """Check the artifact's structure against the bundle's manifest and weights.

    Args:
        bundle: an opened bundle.
        weights: canonical weights in the artifact's dtype.

    Raises:
        InputError: the format is unknown.
    """
    found = require_format(bundle.manifest.format)
    try:
        return [*found.contract(bundle, weights), *_engine_files(found, bundle)]
    except (DiffDeployError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a library raises for a damaged artifact is reported
        # Only the first line, since libraries append details for their own developers.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [Check(name="readable", passed=False, detail=f"the artifact cannot be read: {reason}")]


def _engine_files(found: Format, bundle: Bundle) -> list[Check]:
    """Check that the files for engines agree with the manifest; bundles from earlier versions have no such files."""
    files = bundle.manifest.files.keys()
    expected = {n: text for n, text in found.engine_files(bundle.manifest, bundle.path).items() if n in files}
    wrong = [f"{name} is not that of this bundle" for name, text in expected.items()
             if (bundle.path / name).read_bytes() != text]  # fmt: skip
    return [make_check("engine files", wrong, ", ".join(expected))] if expected else []
