"""Every field of a manifest with wrong values, signed anew: each is refused, or seen by verification, or harmless."""

import copy
import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffdeploy.bundle import Manifest, open_bundle, read_weights
from diffdeploy.checkpoints import Checkpoint, ModelCheckpoint
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.config import AnyConfig
from diffdeploy.errors import DiffDeployError, IntegrityError
from diffdeploy.formats import RunOptions
from diffdeploy.runtime import least_versions, require_runnable
from diffdeploy.selftest.local_artifact import LocalArtifact
from diffdeploy.verify import artifact_checks, verify_bundle
from diffdeploy.verify.golden import golden_check
from tests.support.blocks import ROPE, make_config
from tests.support.bundles import BundleCache, FormatBundle, options_of
from tests.support.manifests import fields_of, reached, set_to, signed_again
from tests.support.models import decoder_weights, make_decoder
from tests.support.pairwise import rest_is_slow

# They share bundles, for which a second worker would wait.
pytestmark = pytest.mark.xdist_group("test_manifest_fields")

GONE = "a key that is not there"

# Fields that may say something else, and why nothing goes wrong then.
HARMLESS = {
    "environment*": "nothing but people read it, torch aside, which the contract compares",
    "provenance.files*": "what --checkpoint compares, and nothing else can",
    "provenance.layout": "the same",
    "provenance.keys*": "the same",
    "provenance.defaults*": "the same",
    "provenance.options*": "what --checkpoint reads with, and refuses",
    "options.attention_impl": "two implementations write the same two attentions",
    "graph.axes.batch_size.max": "another promise, which the verification tries",
    "verified": "without a report it is not believed",
    "schema_version": "the first schema has no field that the second one lacks",
    "config.version": "1.0 and True are 1",
}


def said(value: Any) -> str | None:
    """Of a case, the field that it is about."""
    return ".".join(map(str, value)) if isinstance(value, tuple) else None if isinstance(value, str) else repr(value)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def wrong_values(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value, None, int(value)]
        case int():
            return [-1, value + 1, 2**40, float(value), str(value), None]
        case float():
            return [1.001 * value, -value, 0.0, 1e300, str(value), None]
        case str():
            return ["x", "", "float16", "cached", f"{value} ", None, 7]
        case list():
            return [[], value[::-1], [*value, "x"], None]
        case dict():
            return [{}, {**value, "x": 1}, {**value, "x": "x"}, dict(reversed(value.items())), None]
    return [1, -0.5, 1e-6, "x", True, {}]


def mutated(fields: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name of a field, what is wrong there, and the manifest with it."""
    for path in places(fields):
        values = wrong_values(reached(fields, path))
        for value in [*values, *([GONE] if isinstance(path[-1], str) else [])]:
            changed = copy.deepcopy(fields)
            node = reached(changed, path[:-1])
            if value == GONE:
                del node[path[-1]]
            else:
                node[path[-1]] = value
            yield ".".join(map(str, path)), value, changed
    for name, value in (
        ("device", "cpu"),
        ("device", "cuda"),
        ("opset", 18),
        ("flavor", "standard"),
        ("speed", "high"),
    ):
        changed = copy.deepcopy(fields)
        changed["options"][name] = value
        if changed != fields:
            yield f"options.{name}", value, changed


def is_seen(path: Path) -> bool:
    """Whether anything between opening a bundle and verifying it refuses it."""
    try:
        bundle = open_bundle(path)
        require_runnable(bundle.manifest, RunOptions())
        weights = read_weights(bundle)
        exact = {name: array.astype(np.float64) for name, array in weights.items()}
        if not all(check.passed for check in (*artifact_checks(bundle, weights), golden_check(bundle, exact))):
            return True
        return not verify_bundle(path, cases=2, open_artifact=LocalArtifact).passed
    except DiffDeployError:
        return True


def means_the_same(path: Path, good: Manifest) -> bool:
    """Whether the manifest is the same one, written otherwise: with a default left out, or in another order."""
    try:
        found = open_bundle(path).manifest
    except DiffDeployError:
        return False
    # Backends take tensors by their places, and dictionaries in another order are equal.
    orders = [(list(each.graph.inputs), list(each.graph.outputs)) for each in (found, good)]
    # Whatever a manifest requires, the table of the format counts beside it.
    if least_versions(found) == least_versions(good):
        found = found.model_copy(update={"requires": good.requires})
    return found == good and orders[0] == orders[1]


def cached_bundle(bundles: BundleCache, sample: Checkpoint) -> Path:
    return bundles.bundle(sample, options_of("onnx", graph="cached", dtype="float16"), verify=False)


def model_bundle(bundles: BundleCache, block: AnyConfig | None = None, **changes: Any) -> Path:
    config = make_decoder(num_layers=2, attention=block)
    found = ModelCheckpoint(
        config=config, weights=decoder_weights(config), layout="diffdeploy", keys=list(config.weight_shapes())
    )
    return bundles.bundle(found, options_of("onnx", graph="model", max_sequence_length=20, **changes), verify=False)


@pytest.fixture(params=rest_is_slow(["onnx model", "pt2", "onnx", "onnx cached"]))
def subject(
    request: pytest.FixtureRequest,
    format_bundle: FormatBundle,
    sample: Checkpoint,
    bundles: BundleCache,
    tmp_path: Path,
) -> Path:
    match request.param:
        case "onnx cached":
            source = cached_bundle(bundles, sample)
        case "onnx model":
            source = model_bundle(bundles)
        case name:
            source = format_bundle(name)
    shutil.copytree(source, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_no_wrong_value_goes_unseen(subject: Path) -> None:
    good, fields = open_bundle(subject).manifest, fields_of(subject)
    fields.pop("manifest_sha256")
    unseen, count = [], 0
    for name, value, changed in mutated(fields):
        if any(fnmatchcase(name, pattern) for pattern in HARMLESS):
            continue
        count += 1
        signed_again(subject, changed)
        if not means_the_same(subject, good) and not is_seen(subject):
            unseen.append((name, value))
    assert unseen == []
    assert count > 250


@pytest.mark.parametrize("activations", rest_is_slow(["int8", "float32"]))
def test_no_wrong_quantisation_goes_unseen(activations: str, bundles: BundleCache, tmp_path: Path) -> None:
    block = make_config(embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, rope=ROPE)
    path = tmp_path / "bundle"
    options = {"onnx_flavor": "ort", "weights": "int4", "activations": activations, "quantise_head": True}
    shutil.copytree(model_bundle(bundles, block, **options), path)
    good, fields = open_bundle(path).manifest, fields_of(path)
    fields.pop("manifest_sha256")
    unseen, count = [], 0
    for name, value, changed in mutated(fields):
        if not name.startswith("options.quantisation"):
            continue
        count += 1
        signed_again(path, changed)
        if not means_the_same(path, good) and not is_seen(path):
            unseen.append((name, value))
    assert unseen == []
    assert count > 20


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("options", "seed"), -1, "has the seed -1; accepted: 0 or more"),
        (("provenance", "layer"), 7, "has layer 7, which no key"),
        (("provenance", "layer"), -1, "has layer -1, which no key"),
        (("provenance", "keys"), ["9" * 5000], "has layer 1, which no key"),
        (("provenance", "layer"), None, "has layer None, but layer 1 was requested"),
        (("provenance", "options"), {"layer": 3}, "has layer 1, but layer 3 was requested"),
        (("provenance", "keys"), [], "has layer 1, which no key"),
        (("provenance", "files", "model.safetensors", "sha256"), "x", "is not a manifest"),
        (("provenance", "files", "model.safetensors", "size"), -1, "is not a manifest"),
    ],
    ids=said,
)
def test_what_cannot_be_said_of_an_export(path: tuple[str, ...], value: Any, message: str, bundle_copy: Path) -> None:
    set_to(bundle_copy, path, value)
    with pytest.raises(IntegrityError, match=message):
        open_bundle(bundle_copy)


def test_a_model_is_of_no_one_layer(bundles: BundleCache, tmp_path: Path) -> None:
    shutil.copytree(model_bundle(bundles), tmp_path / "bundle")
    set_to(tmp_path / "bundle", ("provenance", "layer"), 1)
    with pytest.raises(IntegrityError, match="has layer 1, but a whole model has no single layer"):
        open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("graph", ["cached", "model"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_the_order_of_tensors_is_that_of_the_graph(
    side: str, graph: str, sample: Checkpoint, bundles: BundleCache, tmp_path: Path
) -> None:
    """Backends take them by their places, where keys and values of the past may have one shape."""
    source = cached_bundle(bundles, sample) if graph == "cached" else model_bundle(bundles)
    shutil.copytree(source, tmp_path / "bundle")
    names = fields_of(tmp_path / "bundle")["graph"][side]
    set_to(tmp_path / "bundle", ("graph", side), dict(reversed(names.items())))
    with pytest.raises(IntegrityError, match=f"the order of its {side} is {', '.join(reversed(names))}"):
        open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("onnx", ("options", "flavor"), None, "has flavor None, which no export to format onnx writes"),
        ("onnx", ("options", "opset"), 25, "has opset 25"),
        ("onnx", ("options", "device"), "cpu", "has device 'cpu'"),
        ("onnx", ("options", "attention_impl"), "naive", "has attention_impl 'naive'"),
        ("onnx", ("made_for",), {"torch": "2"}, r"has made_for \['torch'\]"),
        ("pt2", ("options", "opset"), 23, "has opset 23, which no export to format pt2 writes"),
        ("pt2", ("options", "flavor"), "standard", "has flavor 'standard'"),
        ("aoti", ("made_for",), {}, r"has made_for \[\], which no export to format aoti writes"),
        ("aoti", ("options", "device"), None, "has device None"),
    ],
    ids=said,
)
def test_what_cannot_be_said_of_a_format(
    name: str, path: tuple[str, ...], value: Any, message: str, format_bundle: FormatBundle, tmp_path: Path
) -> None:
    shutil.copytree(format_bundle(name), tmp_path / "bundle")
    require_runnable(open_bundle(tmp_path / "bundle").manifest, RunOptions())
    set_to(tmp_path / "bundle", path, value)
    with pytest.raises(IntegrityError, match=message):
        require_runnable(open_bundle(tmp_path / "bundle").manifest, RunOptions())


@pytest.mark.parametrize(
    ("path", "value", "code", "message"),
    [
        (("layout",), "microsoft", 1, "the manifest has layout 'microsoft', but the checkpoint has 'diffdeploy'"),
        (("keys", 0), "layers.1.x", 1, "the manifest has keys ['layers.1.x'"),
        (("defaults",), {"norm_eps": "1"}, 1, "the manifest has defaults {'norm_eps': '1'}, but the checkpoint has {}"),
        (("files", "model.safetensors", "size"), 1, 1, "the manifest has sizes of files {'model.safetensors': 1}"),
        (("files", "model.safetensors", "sha256"), "0" * 64, 0, "manifest names other files"),
        (("options",), {"layer": 1, "layers": 2}, 5, "layers is 2, which is not a valid checkpoint option"),
        (("options",), {"layer": 1, "gqa_layout": "x"}, 5, "gqa_layout is 'x', which is not a valid checkpoint option"),
        (("options",), {"layer": 1, "norm_eps": "1"}, 5, "norm_eps is '1', which is not a valid checkpoint option"),
    ],
    ids=said,
)
def test_a_checkpoint_shows_what_is_false_in_the_provenance(
    path: tuple[Any, ...],
    value: Any,
    code: int,
    message: str,
    bundle_copy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_to(bundle_copy, ("provenance", *path), value)
    assert main(["verify", str(bundle_copy), "--cases", "1", "--checkpoint", str(SAMPLE)]) == code
    # In the table a sentence is folded.
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_layer_of_keys_that_another_number_is_in(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What opening cannot tell: both numbers are in the keys."""
    fields = fields_of(bundle_copy)
    source = fields["provenance"]
    source.update(layer=0, options={"prefix": "layers.1"}, keys=[f"{key}.0" for key in source["keys"]])
    signed_again(bundle_copy, fields)
    assert main(["verify", str(bundle_copy), "--cases", "1", "--checkpoint", str(SAMPLE)]) == 1
    assert "the manifest has layer 0, but the checkpoint has 1" in capsys.readouterr().err


def test_what_has_no_report_is_not_called_verified(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = fields_of(bundle_copy)
    (bundle_copy / "verification.json").unlink()
    del fields["files"]["verification.json"]
    signed_again(bundle_copy, fields)
    assert json.loads((bundle_copy / "manifest.json").read_text())["verified"]
    assert main(["inspect", str(bundle_copy)]) == 0
    assert "onnx, NOT verified" in capsys.readouterr().out
