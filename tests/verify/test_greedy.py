"""Generated tokens are held against the formula wherever it tells which is the most probable one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from diffdeploy.arrays import Array
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.selftest.local_artifact import LocalArtifact
from diffdeploy.verify import verify_bundle
from diffdeploy.verify.greedy import wrong_tokens
from tests.support.bundles import SMALL_MODEL, BundleCache


@pytest.fixture(scope="module")
def sample_model(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), SMALL_MODEL)


def test_a_token_is_wrong_only_where_the_margin_tells() -> None:
    logits = np.array([[3.0, 1.0, 0.0], [3.0, 2.9, 0.0], [3.0, 2.9, 0.0], [0.0, 1.0, 5.0]])
    wrong, checked = wrong_tokens(logits, np.array([0, 1, 2, 1]), 0.1)
    assert list(wrong) == [2, 3]
    assert checked == 2


class OneTokenOff(LocalArtifact):
    """Generation that gives another token in one place; its calls are right."""

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        tokens = super().generate(inputs, num_tokens)
        tokens[1, -3] ^= 1
        return tokens


class ForgetsThePrompt(LocalArtifact):
    """Generation that continues something else."""

    def generate(self, inputs: Mapping[str, Array], num_tokens: int) -> Array:
        tokens = super().generate(inputs, num_tokens)
        return np.roll(tokens, 1, axis=0)


@pytest.mark.parametrize(
    ("artifact", "detail"),
    [(OneTokenOff, "are not the most probable ones, first in row 1 token 13"), (ForgetsThePrompt, "not prompts")],
)
def test_wrong_tokens_fail_a_bundle(artifact: type[LocalArtifact], detail: str, sample_model: Path) -> None:
    report = verify_bundle(sample_model, cases=1, open_artifact=artifact)
    (check,) = (check for check in report.contract if check.name == "greedy tokens")
    assert not check.passed
    assert detail in check.detail
    assert not report.passed


def test_right_ones_are_counted(sample_model: Path) -> None:
    report = verify_bundle(sample_model, cases=1)
    assert report.passed
    assert report.greedy_tokens_checked is not None
    assert 40 <= report.greedy_tokens_checked <= 48
