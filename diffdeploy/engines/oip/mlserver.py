"""A bundle as a model of MLServer."""

import asyncio
from pathlib import Path
from typing import Any

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.errors import InferenceError
from mlserver.settings import ModelParameters
from mlserver.types import Datatype, InferenceRequest, InferenceResponse, MetadataTensor, ResponseOutput

from diffdeploy.engines.oip.protocol import Served, TensorMetadata, WireTensor, datatype_of
from diffdeploy.errors import InputError
from diffdeploy.formats import RunOptions
from diffdeploy.runtime import open_runtime

__all__ = ["BundleModel", "run_server"]


class BundleModel(MLModel):
    """Adapter through which MLServer calls a bundle.

    In a ``model-settings.json``, ``parameters.uri`` is the bundle, and ``parameters.extra`` contains the fields of
    `RunOptions`.
    """

    async def load(self) -> bool:
        """Open the bundle.

        Raises:
            DiffDeployError: the bundle cannot be used here.
        """
        parameters = self.settings.parameters
        extra = dict((parameters and parameters.extra) or {})
        self._served: Served = extra.pop("served", None) or _opened(parameters, extra)
        self._settings.platform = self._served.platform
        self.inputs, self.outputs = _described(self._served.inputs), _described(self._served.outputs)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer a request.

        Raises:
            InferenceError: the request is invalid; the server answers with 400 and the message.
        """
        inputs = [
            WireTensor(name=each.name, datatype=Datatype(each.datatype).value, shape=each.shape, data=each.data.root)
            for each in payload.inputs
        ]
        parameters = payload.parameters.model_dump(exclude_unset=True) if payload.parameters else None
        names = [output.name for output in payload.outputs] if payload.outputs else None
        try:
            # In a thread, so that the server can answer other requests and health checks while a model generates.
            found = await asyncio.to_thread(self._served.answer, inputs, parameters, names)
        except InputError as error:
            raise InferenceError(str(error)) from error
        outputs = [
            ResponseOutput(
                name=name, datatype=datatype_of(array), shape=list(array.shape), data=array.reshape(-1).tolist()
            )
            for name, array in found.items()
        ]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)

    async def unload(self) -> bool:
        """Release the bundle."""
        self._served.close()
        return True


def _opened(parameters: ModelParameters | None, options: dict[str, Any]) -> Served:
    if parameters is None or parameters.uri is None:
        raise InputError("parameters.uri is missing in the settings of the model; give the directory of a bundle")
    return Served(open_runtime(Path(parameters.uri), RunOptions(**options)))


def _described(tensors: tuple[TensorMetadata, ...]) -> list[MetadataTensor]:
    return [MetadataTensor(**tensor._asdict()) for tensor in tensors]


def run_server(served: Served, name: str, host: str, port: int) -> None:
    """Serve a bundle until this process is told to stop."""

    async def run() -> None:
        settings = Settings(
            debug=False,
            host=host,
            http_port=port,
            # gRPC cannot be switched off, so it gets a free port and not one that another server may use.
            grpc_port=0,
            # Each worker process would open the bundle again.
            parallel_workers=0,
            metrics_endpoint=None,
            load_models_at_startup=False,
            # Clients may load other models from this folder; a bundle contains none that MLServer could load.
            model_repository_root=str(served.path),
        )
        model = ModelSettings(
            name=name, implementation=BundleModel, parameters=ModelParameters(extra={"served": served})
        )
        await MLServer(settings).start([model])

    asyncio.run(run())
