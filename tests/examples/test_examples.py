"""The examples, run as their users run them: each writes the tokens that `generate` of the bundle writes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diffdeploy
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.exporters import convert_model
from tests.engines.test_oip_servers import server
from tests.support.browser import browser, served
from tests.support.bundles import ENGINE_MODEL, SMALL_MODEL, BundleCache
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
PROMPT, NUM_TOKENS = "def main(", 24


@pytest.fixture(scope="module")
def model(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), SMALL_MODEL)


def text_of(model: Path, prompt: str, num_tokens: int = NUM_TOKENS) -> str:
    with diffdeploy.load(model) as runtime:
        ids = np.array([runtime.tokenizer.encode(prompt)])
        return runtime.tokenizer.decode(runtime.generate(ids, max_new_tokens=num_tokens)[0].tolist())


def said_by(python: Path | str, name: str, *arguments: str | Path) -> str:
    """What an example prints in an environment, which sees this package only where it is installed or named."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    surroundings = {**outside, "PYTHONPATH": str(ROOT)} if python == sys.executable else outside
    done = subprocess.run(
        [python, EXAMPLES / name, *arguments], env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("genai", marks=pytest.mark.genai), "transformers"])
def test_python(name: str, model: Path) -> None:
    said = said_by(sys.executable, f"{name}/generate.py", model, PROMPT, str(NUM_TOKENS))
    assert said == text_of(model, PROMPT) + "\n"


def test_onnxruntime_takes_20_lines() -> None:
    code = (EXAMPLES / "onnxruntime" / "generate.py").read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line]) <= 20


@pytest.mark.engines
def test_optimum(model: Path, bundles: BundleCache) -> None:
    """A batch, padded on the left, too; the flavor that would be wrong there is refused."""
    python = ROOT / ".venv-engines-optimum/bin/python"
    prompts = [PROMPT, "import os\n", "x"]
    said = said_by(python, "optimum/generate.py", model, str(NUM_TOKENS), *prompts)
    assert [json.loads(line) for line in said.splitlines()] == [text_of(model, prompt) for prompt in prompts]
    ort = bundles.bundle(read_model(SAMPLE), replace(SMALL_MODEL, onnx_flavor="ort"))
    with pytest.raises(AssertionError, match="optimum pads on the left"):
        said_by(python, "optimum/generate.py", ort, "4", PROMPT)


@pytest.mark.engines
def test_vllm(model: Path, tmp_path: Path) -> None:
    convert_model(read_model(SAMPLE), tmp_path / "converted")
    python = ROOT / ".venv-engines-vllm/bin/python"
    said = said_by(python, "vllm/generate.py", tmp_path / "converted", PROMPT, str(NUM_TOKENS))
    assert text_of(model, PROMPT) in said.splitlines()  # among what vLLM logs


@pytest.mark.engines
@pytest.mark.parametrize("name", ["kserve", "mlserver"])
def test_the_client_of_triton_asks_other_servers_of_its_protocol(name: str, sample_bundle: Path) -> None:
    with server(name, sample_bundle) as (_, ask):
        url = f"http://127.0.0.1:{ask.port}"
        said = said_by(sys.executable, "triton/client.py", url, sample_bundle.name)
    assert said.startswith("output [1, 5, 128] [")


@pytest.mark.engines
def test_the_web_page(bundles: BundleCache, tmp_path: Path) -> None:
    """In headless Chromium, with the same greedy tokens; nothing but the page's own files is asked for."""
    model = bundles.bundle(read_model(SAMPLE), ENGINE_MODEL)
    page = tmp_path / "web"
    shutil.copytree(EXAMPLES / "web", page, ignore=shutil.ignore_patterns("node_modules", "model"))
    subprocess.run(["npm", "ci", "--ignore-scripts"], cwd=page, check=True, capture_output=True)
    shutil.copytree(model, page / "model")
    with served(page) as (url, asked), browser(900, 700) as window:
        window.open(f"{url}/index.html")
        tokens = window.run("""
            const wait = (test) => new Promise((done) => setInterval(() => test() && done(), 20));
            const write = document.getElementById("write");
            await wait(() => !write.disabled);
            document.getElementById("count").value = 40;
            write.click();
            await wait(() => document.body.dataset.tokens);
            return JSON.parse(document.body.dataset.tokens);
        """)
        hosts = window.run('return performance.getEntriesByType("resource").map((entry) => new URL(entry.name).origin)')
        if folder := os.environ.get("DIFFDEPLOY_PICTURES"):
            window.picture(Path(folder) / "web.png")
    assert set(hosts) == {url}
    assert any(path.endswith(".wasm") for path in asked)
    with diffdeploy.load(model) as runtime:
        expected = runtime.generate(np.array([list(b"def main(argv=None):")]), max_new_tokens=40)
    assert tokens == expected[0].tolist()
