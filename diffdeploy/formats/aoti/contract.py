"""The contract of an AOTInductor package, read from its files, without loading machine code into this process.

The machine code itself cannot be read. However, the package also contains the C++ source from which it was compiled,
and the library contains the weights byte for byte.
"""

import json
import re
import zipfile
from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import WEIGHTS, Bundle
from diffdeploy.config import is_lambda_vector
from diffdeploy.errors import IntegrityError
from diffdeploy.formats.aoti.backend import MODEL
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import attentions, declared_facts, make_check, other_torch

__all__ = ["checks", "facts"]

# Tensors with at most this many elements become numbers in the code (GraphLowering.can_inline_constant of inductor).
_MOST_INLINE = 8
_NUMBER = re.compile(rb"static_cast<\w+>\(([-+.\de]+)\)")
# The name of torch's kernel depends on the device and on the mask. With `fused`, every attention has one call of
# `prefill`, the kernel for any number of queries. Unlike a call, the definition of its function begins with a type.
_ATTENTION = re.compile(rb"\baoti_torch_\w*scaled_dot_product_\w+\(|(?<!void )\bcall_prefill_\d+\(")
# Exponentials of decomposed softmaxes; the exponential in a sigmoid, whose argument is negated, does not match.
_EXPONENTIAL = re.compile(rb"\bstd::exp\w*\((?!-)|(?<!\.neg\(\))\.exp\w*\(|\baoti_torch_\w*softmax\w*\(")


def _member(bundle: Bundle, ending: str) -> bytes:
    try:
        with zipfile.ZipFile(bundle.path / MODEL) as package:
            return package.read(next(name for name in package.namelist() if name.endswith(ending)))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise IntegrityError(f"{MODEL} in {bundle.path} is not an AOTInductor package: it lacks {ending}") from error


def _attentions(bundle: Bundle) -> int:
    return len(_ATTENTION.findall(_member(bundle, ".wrapper.cpp")))


def _exponentials(bundle: Bundle) -> int:
    """Number of exponentials in the C++ kernels for a CPU, which indicate softmaxes outside of the fused attentions."""
    # Not counted for these two: `rows` decomposes the attention for one token, and with `fused`, comments contain the
    # source of the kernel.
    if bundle.manifest.options.attention_impl in ("rows", "fused"):
        return 0
    with zipfile.ZipFile(bundle.path / MODEL) as package:
        sources = [package.read(name) for name in package.namelist() if name.endswith(".cpp")]
    return sum(len(_EXPONENTIAL.findall(source)) for source in sources)


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    return declared_facts(bundle, _attentions(bundle))


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `Format.contract`."""
    count, metadata = _attentions(bundle), json.loads(_member(bundle, ".wrapper_metadata.json"))
    exponentials, expected = _exponentials(bundle), (attentions(bundle), 0)
    found = f"{count} fused-attention calls and {exponentials} exp calls in the source of the package"
    odd = [] if (count, exponentials) == expected else [f"{found}; expected {expected[0]} and {expected[1]}"]
    same = metadata.get("weights_sha256") == bundle.manifest.files[WEIGHTS].sha256
    problems = [] if same else ["the digest in the metadata is that of other weights"]
    return [
        make_check("attention", odd, found),
        make_check(
            "weights", problems + _missing_weights(bundle, weights), "those of weights.safetensors, bit for bit"
        ),
        make_check(
            "traces", other_torch(str(metadata.get("torch")), bundle.manifest), "compiled by the declared torch"
        ),
    ]


def _missing_weights(bundle: Bundle, weights: Mapping[str, Array]) -> list[str]:
    library = _member(bundle, ".so")
    held = {name: array for name, array in weights.items() if not is_lambda_vector(name)}
    missing = {name: array for name, array in held.items() if array.tobytes() not in library}
    if any(array.size <= _MOST_INLINE for array in missing.values()):
        # The code contains these numbers in a form that is parsed to the same float.
        numbers = {float(number) for number in _NUMBER.findall(_member(bundle, ".kernel.cpp"))}
        missing = {
            name: array
            for name, array in missing.items()
            if array.size > _MOST_INLINE or not numbers.issuperset(array.astype(np.float64).reshape(-1).tolist())
        }
    return [f"{name} is not in the package bit for bit" for name in missing]
