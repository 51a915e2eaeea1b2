"""Overhead of a server over the runtime that it calls, on loopback, for one block with D 1024.

    python scripts/measure_serving.py .venv-engines-kserve/bin/diffdeploy .venv-engines-mlserver/bin/diffdeploy

Requests of 16 tokens go to each server over one open connection, alternating with calls of the runtime in this process,
all in one thread. KServe receives requests in binary form and in JSON, MLServer in JSON. The overhead is the difference
of medians.
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

import diffdeploy
from diffdeploy.arrays import Array
from diffdeploy.bench.synthetic import random_checkpoint
from diffdeploy.exporters import ExportOptions, export_bundle

_ROUNDS, _STARTUP_SECONDS = 200, 120
_NAME, _TOKENS = "block", 16
Call = Callable[[], object]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def started(command: Path, bundle: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the server in the environment of a ``diffdeploy`` command, and return its process when it is ready."""
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [command.absolute(), "serve", bundle, "--port", str(port), "--threads", "1"],
        env=surroundings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=bundle.parent,
    )
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", f"/v2/models/{_NAME}/ready")
            if connection.getresponse().status == http.client.OK:
                return process
        except OSError:
            pass
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"{command} serve was not ready after {_STARTUP_SECONDS} s")


def post(connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> bytes:
    connection.request("POST", f"/v2/models/{_NAME}/infer", body, headers)
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != http.client.OK:
        raise SystemExit(f"the server answered {answer.status}: {said[:300]!r}")
    return said


def requests(server: str, port: int, states: Array) -> dict[str, Call]:
    """Requests in each form, over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    tensor = {"name": "hidden_states", "shape": list(states.shape), "datatype": "FP32"}
    text = json.dumps({"inputs": [{**tensor, "data": states.ravel().tolist()}]}).encode()
    found: dict[str, Call] = {f"{server}, JSON": partial(post, connection, text, {"Content-Type": "application/json"})}
    if server == "kserve":
        described = {**tensor, "parameters": {"binary_data_size": states.nbytes}}
        head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        found[f"{server}, binary"] = partial(post, connection, head + states.tobytes(), headers)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", type=Path, nargs="+", help="diffdeploy in an environment with one server")
    commands = parser.parse_args().commands
    torch.manual_seed(0)
    states = np.random.default_rng(0).standard_normal((1, _TOKENS, 1024)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / _NAME
        block = random_checkpoint(embed_dim=1024, num_heads=8, num_kv_heads=8, head_dim=64)
        export_bundle(block, bundle, ExportOptions(max_batch_size=4, max_sequence_length=64), verify=False)
        runtime = diffdeploy.load(bundle, threads=1)
        calls: dict[str, Call] = {"runtime": partial(runtime, hidden_states=states)}
        servers = []
        try:
            for command in commands:
                # The folder of the environment is named after its server.
                name, port = command.absolute().parents[1].name.rpartition("-")[2], free_port()
                servers.append(started(command, bundle, port))
                calls |= requests(name, port, states)
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for number in range(_ROUNDS + 10):
                for name, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    if number >= 10:  # the first ones do not count
                        samples[name].append(time.perf_counter() - begin)
        finally:
            for server in servers:
                server.terminate()
                server.wait()
    base = median(samples["runtime"])
    for name, times in samples.items():
        print(f"{name}: {median(times) * 1e3:.2f} ms, {(median(times) - base) * 1e3:+.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
