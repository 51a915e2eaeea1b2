"""The contract of an AOTInductor package: what its metadata say must be what the bundle says.

The package is machine code, so its structure cannot be read; the counts come from the program that was compiled.
"""

from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import WEIGHTS, Bundle
from diffdeploy.verify.contracts.common import check, declared
from diffdeploy.verify.report import Check, GraphFacts

__all__ = ["checks", "facts"]


def _metadata(bundle: Bundle) -> dict[str, str]:
    import torch

    metadata: dict[str, str] = torch._inductor.aoti_load_package(str(bundle.path / "model.pt2")).get_metadata()
    return metadata


def facts(bundle: Bundle) -> GraphFacts:
    """See `diffdeploy.verify.contracts.facts`."""
    return declared(bundle, int(_metadata(bundle).get("attention_ops", "0")))


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `diffdeploy.verify.contracts.checks`."""
    metadata = _metadata(bundle)
    count, digest = metadata.get("attention_ops"), metadata.get("weights_sha256")
    counted = [] if count == "2" else [f"the metadata say {count} attentions; expected 2"]
    same = digest == bundle.manifest.files[WEIGHTS].sha256
    return [
        check("attention", counted, "2 scaled_dot_product_attention calls in the program that was compiled"),
        check("weights", [] if same else ["the metadata name other weights"], "compiled from weights.safetensors"),
    ]
