"""A bundle as a model of KServe."""

import asyncio
from typing import Any
from uuid import uuid4

import kserve
from kserve.errors import InferenceError, InvalidInput, invalid_input_handler
from kserve.model_server import app

from diffdeploy.engines.oip.protocol import Served, TensorMetadata, WireTensor, datatype_of
from diffdeploy.errors import InputError

__all__ = ["BundleModel", "run_server"]

# Errors of the server for an unreadable binary request, which it would answer with 500.
_UNREADABLE = (KeyError, TypeError, ValueError)


class BundleModel(kserve.Model):
    """Adapter through which KServe calls a bundle.

    Args:
        name: name of the model in URLs.
        served: the bundle.
    """

    def __init__(self, name: str, served: Served) -> None:
        super().__init__(name)
        self._served = served
        # The bundle is already open; the server refuses models that do not report being ready.
        self.ready = True

    def get_input_types(self) -> list[dict[str, Any]]:
        """Descriptions of the inputs, for the metadata."""
        return _as_dicts(self._served.inputs)

    def get_output_types(self) -> list[dict[str, Any]]:
        """Descriptions of the outputs, for the metadata."""
        return _as_dicts(self._served.outputs)

    async def predict(
        self,
        payload: kserve.InferRequest,
        headers: dict[str, str] | None = None,  # noqa: ARG002 - passed by the server
    ) -> kserve.InferResponse:
        """Answer a request.

        Raises:
            InvalidInput: the request is invalid; the server answers with 400 and the message.
            InferenceError: the runtime failed; the server answers with 500.
        """
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidInput("this is a request of the first version of the protocol; accepted: /v2/models")
        inputs = [
            WireTensor(name=each.name, datatype=each.datatype, shape=each.shape, data=each.data)
            for each in payload.inputs
        ]
        asked = payload.request_outputs
        names = [output.name for output in asked] if asked else None
        try:
            # In a thread, so that the server can answer other requests and health checks while a model generates.
            found = await asyncio.to_thread(self._served.answer, inputs, payload.parameters, names)
        except InputError as error:
            raise InvalidInput(str(error)) from error
        except _UNREADABLE as error:
            # The request passed all checks, so this is not its fault.
            raise InferenceError(f"unexpected {type(error).__name__}: {error}") from error
        outputs = [
            kserve.InferOutput(name, list(array.shape), datatype_of(array), data=array) for name, array in found.items()
        ]
        # The server cannot encode FP16 in JSON.
        binary = payload.use_binary_outputs or any(output.datatype == "FP16" for output in outputs)
        # Clients may omit the id, but the server's answers may not.
        identity = payload.id or str(uuid4())
        return kserve.InferResponse(identity, self.name, outputs, use_binary_outputs=binary, requested_outputs=asked)


def _as_dicts(tensors: tuple[TensorMetadata, ...]) -> list[dict[str, Any]]:
    return [{**tensor._asdict(), "shape": list(tensor.shape)} for tensor in tensors]


class _Server(kserve.ModelServer):
    """KServe's server, limited to one address; by default, it listens on all addresses."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(http_port=port, enable_grpc=False)
        self._host = host

    async def _serve(self) -> None:
        # Set here, just before the server listens, since the attribute does not exist any earlier.
        self._rest_server.config.host = self._host
        await super()._serve()


def run_server(served: Served, name: str, host: str, port: int) -> None:
    """Serve a bundle until this process is told to stop."""
    for kind in _UNREADABLE:
        app.add_exception_handler(kind, invalid_input_handler)
    _Server(host, port).start([BundleModel(name, served)])
