"""KServe and MLServer themselves, in environments of their own, on loopback: answers are the runtime's bit for bit."""

import http.client
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffdeploy
from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import Checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.exporters import ExportOptions
from diffdeploy.runtime import Runtime
from tests.cli.test_serve_command import free_port
from tests.engines.test_oip_protocol import hidden
from tests.support.bundles import ENGINE_MODEL, BundleCache
from tests.support.memory import resident_kib
from tests.support.paths import ROOT

pytestmark = pytest.mark.engines


class Ask:
    """Asks a server; once for each connection.

    Args:
        port: of the server, on loopback.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def raw(self, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes, int]:
        """Status, what was said, and how much of it is JSON, in the binary form."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET" if body is None else "POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), int(answer.headers.get("Inference-Header-Content-Length", 0))

    def __call__(self, path: str, body: Any = None) -> tuple[int, Any]:
        said = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        status, text, _ = self.raw(path, said, {"Content-Type": "application/json"})
        return status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()


@contextmanager
def server(name: str, bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Ask]]:
    """A server process, once it is ready, and a function that asks it."""
    port = free_port()
    # Without the surroundings of this environment, in which there are other packages.
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command: list[str | Path] = [
        ROOT / f".venv-engines-{name}/bin/diffdeploy",
        "serve",
        bundle,
        "--port",
        str(port),
        *options,
    ]
    folder = tempfile.TemporaryDirectory()
    log = Path(folder.name) / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=stream, cwd=folder.name)

    ask = Ask(port)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            try:
                if ask(f"/v2/models/{bundle.name}/ready")[0] == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < deadline, log.read_text()
            threading.Event().wait(0.1)
        yield process, ask
    finally:
        process.kill()
        process.communicate()
        folder.cleanup()


@pytest.fixture(scope="module")
def block(sample: Checkpoint, bundles: BundleCache) -> Path:
    return bundles.bundle(sample, ExportOptions(max_batch_size=4, max_sequence_length=64, cases="quick"))


@pytest.fixture(scope="module")
def model(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), ENGINE_MODEL)


BOTH = pytest.mark.parametrize("name", ["kserve", "mlserver"])


def states_of(array: np.ndarray[Any, Any], **changes: Any) -> dict[str, Any]:
    tensor = {"name": "hidden_states", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    return {"inputs": [{**tensor, **changes}]}


def array_of(answer: Any, name: str) -> np.ndarray[Any, Any]:
    (found,) = [output for output in answer["outputs"] if output["name"] == name]
    return np.array(found["data"], np.float32 if found["datatype"] == "FP32" else np.int64).reshape(found["shape"])


# What is wrong, and what the server says to it.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "hidden"}, "inputs are ['hidden']; accepted: ['hidden_states']"),
    ({"shape": [1, 3, 127]}, "hidden_states has 384 elements, but its shape is [1, 3, 127]"),
    ({"shape": [3, 128]}, "hidden_states has shape [3, 128]; accepted: ['batch_size', 'sequence_length', 128]"),
    ({"datatype": "FP64"}, "hidden_states has datatype FP64; accepted: FP32"),
    ({"data": ["x"] * 384}, "hidden_states has an element that is not FP32, or rows of different lengths"),
]


@BOTH
def test_two_thousand_requests(name: str, block: Path) -> None:
    sizes = [(1, 3), (2, 17), (4, 16), (1, 64), (3, 1)]
    arrays = [hidden(*size, 128, seed=seed) for seed, size in enumerate(sizes)]
    with diffdeploy.load(block, threads=1) as runtime:
        expected = [runtime(hidden_states=array)["output"].tobytes() for array in arrays]
    bodies = [json.dumps(states_of(array)).encode() for array in arrays]
    wrong = [json.dumps(states_of(arrays[0], **changes)).encode() for changes, _ in WRONG]

    with server(name, block, "--threads", "1") as (process, ask):
        address = f"/v2/models/{block.name}/infer"

        def one(number: int) -> bool:
            if number % 10 == 9:
                status, answer = ask(address, wrong[number // 10 % len(wrong)])
                return status == 400 and answer["error"] == WRONG[number // 10 % len(wrong)][1]
            status, answer = ask(address, bodies[number % len(bodies)])
            return status == 200 and array_of(answer, "output").tobytes() == expected[number % len(bodies)]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(one, range(500)))
            after_500 = resident_kib(process)
            assert all(pool.map(one, range(500, 2000)))
        after_2000 = resident_kib(process)
    print(f"{name}: resident after 500 requests {after_500} KiB, after 2000 {after_2000} KiB")
    assert after_2000 < 1.02 * after_500


@BOTH
def test_health_and_metadata(name: str, model: Path) -> None:
    with server(name, model) as (process, ask):
        assert ask("/v2/health/live")[0] == ask("/v2/health/ready")[0] == 200
        assert ask("/v2")[1]["name"] == name
        status, metadata = ask(f"/v2/models/{model.name}")
        assert status == 200
        assert metadata["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
        names = [tensor["name"] for tensor in metadata["outputs"]]
        assert names == list(open_bundle(model).manifest.graph.outputs)
        assert ask("/v2/models/another")[0] == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""


@BOTH
def test_a_model_generates(name: str, model: Path) -> None:
    address = f"/v2/models/{model.name}/infer"
    ids = {"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": [100, 101, 102]}
    texts = ["def main(argv", "import "]
    text = {"name": "text", "shape": [2], "datatype": "BYTES", "data": texts}
    with server(name, model) as (_, ask), diffdeploy.load(model) as runtime:
        status, answer = ask(address, {"inputs": [ids], "parameters": {"max_new_tokens": 12}})
        assert status == 200
        expected = runtime.generate(np.array([[100, 101, 102]]), max_new_tokens=12)
        np.testing.assert_array_equal(array_of(answer, "output_ids"), expected)
        drawn = {"max_new_tokens": 12, "do_sample": True, "seed": 5, "temperature": 0.7}
        status, answer = ask(address, {"inputs": [text], "parameters": drawn, "outputs": [{"name": "text"}]})
        assert status == 200
        (found,) = answer["outputs"]
        assert (found["name"], found["datatype"], found["shape"]) == ("text", "BYTES", [2])
        assert found["data"] == drawn_texts(runtime, texts, drawn)
        status, answer = ask(address, {"inputs": [text], "parameters": {**drawn, "temperature": -1}})
        assert (status, answer["error"]) == (400, "temperature is -1.0; accepted: a number above 0")
        # The server writes its own sentence where it cannot read a request at all.
        assert ask(address, b'{"inputs"')[0] == 422


def drawn_texts(runtime: Runtime, texts: list[str], options: dict[str, Any]) -> list[str]:
    rows = [runtime.tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    steps = list(runtime.stream(ids, mask, **options))
    return ["".join(step.texts[row] for step in steps if step.texts) for row in range(len(rows))]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_binary_form(dtype: str, sample: Checkpoint, bundles: BundleCache) -> None:
    options = ExportOptions(dtype=dtype, max_batch_size=4, max_sequence_length=64, cases="quick")  # type: ignore[arg-type]
    block = bundles.bundle(sample, options)
    states = hidden(2, 9, 128).astype(dtype)
    with diffdeploy.load(block, threads=1) as runtime:
        expected = runtime(hidden_states=states)["output"].tobytes()
    datatype = {"float32": "FP32", "float16": "FP16"}[dtype]
    with server("kserve", block, "--threads", "1") as (_, ask):

        def post(shape: list[int], size: int) -> tuple[int, bytes, int]:
            tensor: dict[str, Any] = {"name": "hidden_states", "shape": shape, "datatype": datatype}
            tensor["parameters"] = {"binary_data_size": size}
            head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
            headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
            return ask.raw(f"/v2/models/{block.name}/infer", head + states.tobytes(), headers)

        status, answer, length = post([2, 9, 128], states.nbytes)
        assert status == 200, answer
        assert answer[length:] == expected
        for shape, size in (([2, 9, 127], states.nbytes), ([2, 9, 128], 7)):
            status, answer, _ = post(shape, size)
            assert status == 400, answer
            assert "error" in json.loads(answer)


@BOTH
def test_two_servers_on_one_bundle_and_one_is_killed(name: str, model: Path) -> None:
    address = f"/v2/models/{model.name}/infer"
    ids = {"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [100]}
    body = {"inputs": [ids], "parameters": {"max_new_tokens": 60, "eos_token_id": -1}}
    with server(name, model) as (killed, ask_killed), server(name, model) as (_, ask):
        expected = ask(address, body)
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(ask_killed, address, body) for _ in range(40)]
            running[0].result()
            killed.kill()
            ended = [future.exception() is not None for future in running]
        assert any(ended), "it was killed while it answered"
        assert ask(address, body)[1]["outputs"] == expected[1]["outputs"]
    # Digests are checked.
    open_bundle(model)
