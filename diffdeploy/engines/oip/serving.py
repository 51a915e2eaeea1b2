"""`serve`: the server that is installed, on one address, with one bundle."""

import errno
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.formats import RunOptions
from diffdeploy.versions import installed_versions

__all__ = ["ServeRequest", "serve", "server_names"]


class _Server(NamedTuple):
    """How a server is had and started.

    Attributes:
        extra: of diffdeploy, that installs it.
        module: with its ``run_server``.
    """

    extra: str
    module: str


# The first one that is installed is taken. The two ask for other versions of one package, so that both never are.
_SERVERS = {
    "kserve": _Server("serve", "diffdeploy.engines.oip.kserve"),
    "mlserver": _Server("mlserver", "diffdeploy.engines.oip.mlserver"),
}


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What is to be served, and where.

    Attributes:
        bundle: the directory; its name is that of the model in addresses.
        options: how the bundle is run.
        host: address to listen at.
        port: of HTTP.
        server: its name; by default the one that is installed.
    """

    bundle: Path
    options: RunOptions
    host: str = "127.0.0.1"
    port: int = 8080
    server: str | None = None


def server_names() -> tuple[str, ...]:
    """Names of the servers that `serve` knows."""
    return tuple(_SERVERS)


def serve(request: ServeRequest, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve a bundle until this process is told to end.

    Args:
        request: what, and where.
        ready: called with a sentence before the server starts.

    Raises:
        InputError: there is no such server or address, the port is taken, or the bundle is not accepted.
        UnavailableError: no server is installed, or what the bundle needs is not here.
        DiffDeployError: the bundle cannot be opened, or the server did not start.
    """
    from diffdeploy.engines.oip.protocol import Served
    from diffdeploy.runtime import open_runtime

    name = _server_of(request.server)
    _check_address(request.host, request.port)
    with open_runtime(request.bundle, request.options) as runtime:
        served = Served(runtime)
        model = request.bundle.resolve().name
        ready(f"{name} serves {request.bundle} at http://{request.host}:{request.port}/v2/models/{model}")
        try:
            # Standard output is for results, and one server puts its log there.
            with redirect_stdout(sys.stderr):
                import_module(_SERVERS[name].module).run_server(served, model, request.host, request.port)
        # How uvicorn ends a server that cannot listen.
        except SystemExit as error:
            raise DiffDeployError(f"{name} did not start; its log says why") from error


def _server_of(wanted: str | None) -> str:
    if wanted is not None and wanted not in _SERVERS:
        raise InputError(f"server is {wanted!r}; accepted: {', '.join(_SERVERS)}")
    names = server_names() if wanted is None else (wanted,)
    installed = [name for name in names if installed_versions([name])]
    if not installed:
        said = " nor ".join(names) if wanted is not None else f"neither {' nor '.join(names)}"
        negated = "is not" if wanted is not None else "is"
        raise UnavailableError(f"{said} {negated} installed; pip install 'diffdeploy[{_SERVERS[names[0]].extra}]'")
    return installed[0]


def _check_address(host: str, port: int) -> None:
    """See that a server could listen there, before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do, which may follow each other at once.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken at {host}; give another --port") from error
        raise InputError(f"host {host} and port {port} cannot be listened at ({error.strerror})") from error
