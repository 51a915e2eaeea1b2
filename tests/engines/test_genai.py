"""onnxruntime-genai itself, on bundles as they are exported: log-probabilities and tokens are the formula's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffdeploy.bundle import open_bundle, read_weights, write_manifest
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.engines.genai import GenaiEngine
from diffdeploy.engines.verification import verify_engine
from diffdeploy.errors import InputError
from diffdeploy.verify import verify_bundle
from tests.checkpoints.test_whole_models import diffllama
from tests.support.bundles import SMALL_MODEL, BundleCache
from tests.support.pairwise import rest_is_slow

pytestmark = pytest.mark.xdist_group("test_genai")  # a second worker would wait for the bundle


@pytest.fixture(scope="module", params=rest_is_slow(["ort", "standard"]))
def bundle(request: pytest.FixtureRequest, bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), replace(SMALL_MODEL, onnx_flavor=request.param))


@pytest.mark.genai
def test_the_sample_in_both_flavors(bundle: Path) -> None:
    report = verify_engine(bundle, GenaiEngine())
    assert report.passed, report.worst
    assert {case.id.split("-")[0] for case in report.cases} == {"alone", "batched"}
    assert report.num_tokens == 2 * 3 * 24
    assert report.num_tokens_checked > 100


@pytest.mark.genai
@pytest.mark.slow
def test_a_tied_diffllama_with_an_end_of_texts(bundles: BundleCache, tmp_path: Path) -> None:
    diffllama(tmp_path / "checkpoint", tie_word_embeddings=True, eos_token_id=7, pad_token_id=3, bos_token_id=1)
    path = bundles.bundle(read_model(tmp_path / "checkpoint"), replace(SMALL_MODEL, onnx_flavor="ort"))
    config = json.loads((path / "genai_config.json").read_text())["model"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [7], 3)
    assert (config["decoder"]["num_attention_heads"], config["decoder"]["num_key_value_heads"]) == (8, 2)
    assert config["decoder"]["head_size"] == 16
    report = verify_engine(path, GenaiEngine())
    assert report.passed, report.worst


@pytest.mark.genai
@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_quantised_matrices(weights: Any, activations: Any, bundles: BundleCache) -> None:
    # Against the numbers that the blocks are.
    options = replace(SMALL_MODEL, onnx_flavor="ort", weights=weights, activations=activations, quantise_head=True)
    report = verify_engine(bundles.bundle(read_model(SAMPLE), options), GenaiEngine())
    assert report.passed, report.worst
    assert report.num_tokens_checked > (100 if activations == "float32" else 20)
    allowed = [output.activation_rmse for case in report.cases for output in case.outputs]
    assert all(share > 0 for share in allowed) is (activations == "int8")


@pytest.mark.genai
@pytest.mark.slow
def test_an_artifact_that_is_wrong_fails(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle, path)
    weight = read_weights(open_bundle(bundle))["layers.2.ffn.up_proj.weight"]
    model = onnx.load(path / "model.onnx")
    (held,) = (t for t in model.graph.initializer if t.raw_data in (weight.tobytes(), weight.T.tobytes()))
    held.raw_data = (np.frombuffer(held.raw_data, np.float32) * np.float32(1.01)).tobytes()
    onnx.save(model, path / "model.onnx")
    write_manifest(path, open_bundle(bundle).manifest)
    report = verify_engine(path, GenaiEngine())
    assert not report.passed


def test_a_config_of_another_model_is_seen(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle, path)
    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["decoder"]["num_key_value_heads"] = 4
    (path / "genai_config.json").write_text(json.dumps(config))
    write_manifest(path, open_bundle(bundle).manifest)
    (check,) = (check for check in verify_bundle(path, cases=1).contract if check.name == "engine files")
    assert check.detail == "genai_config.json is not that of this bundle"


@pytest.mark.genai
def test_what_the_engine_does_not_run(bundle: Path, sample_bundle: Path) -> None:
    with pytest.raises(InputError, match="has no genai_config"):
        verify_engine(sample_bundle, GenaiEngine())
    with pytest.raises(InputError, match="is not a bundle, which genai needs"):
        verify_engine(SAMPLE, GenaiEngine())
    with pytest.raises(InputError, match="genai runs a model in one process"):
        verify_engine(bundle, GenaiEngine(), tensor_parallel_size=2)
