"""Send a request for a block to a server with the Open Inference Protocol: python client.py URL MODEL_NAME.

Triton, KServe and MLServer speak it. For Triton, write a model repository and start the server on it:

    diffdeploy deploy BUNDLE --to triton -o repository
    tritonserver --model-repository repository
    python client.py http://127.0.0.1:8000 BUNDLE
"""

import json
import random
import sys
from urllib.request import Request, urlopen

url, name = sys.argv[1], sys.argv[2]
with urlopen(f"{url}/v2/models/{name}") as answer:
    metadata = json.load(answer)
tensor = metadata["inputs"][0]
shape = [1, 5, tensor["shape"][-1]]
values = [random.Random(0).gauss(0, 1) for _ in range(shape[1] * shape[2])]
inputs = [{"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": values}]
request = Request(f"{url}/v2/models/{name}/infer", json.dumps({"inputs": inputs}).encode())
request.add_header("Content-Type", "application/json")
with urlopen(request) as answer:
    for output in json.load(answer)["outputs"]:
        print(output["name"], output["shape"], output["data"][:4])
