"""`serve`, which starts the installed server on one address with one bundle."""

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
    """Installation and location of a server.

    Attributes:
        extra: extra of diffdeploy that installs it.
        module: module with its ``run_server``.
    """

    extra: str
    module: str


# The first installed one is used. They require different versions of one package, so they are never both installed.
_SERVERS = {
    "kserve": _Server("serve", "diffdeploy.engines.oip.kserve"),
    "mlserver": _Server("mlserver", "diffdeploy.engines.oip.mlserver"),
}


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """A bundle to serve, and the address.

    Attributes:
        bundle: directory of the bundle; its name is also the name of the model in URLs.
        options: options for running the bundle.
        host: address to listen on.
        port: HTTP port.
        server: name of the server; by default the installed one.
    """

    bundle: Path
    options: RunOptions
    host: str = "127.0.0.1"
    port: int = 8080
    server: str | None = None


def server_names() -> tuple[str, ...]:
    """Names of the servers that `serve` supports."""
    return tuple(_SERVERS)


def serve(request: ServeRequest, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve a bundle until this process is told to stop.

    Args:
        request: the bundle and the address.
        ready: callback that receives a sentence before the server starts.

    Raises:
        InputError: the server or address does not exist, the port is in use, or the bundle is not accepted.
        UnavailableError: no server is installed, or a requirement of the bundle is missing.
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
            # Standard output is for results, and one server writes its log there.
            with redirect_stdout(sys.stderr):
                import_module(_SERVERS[name].module).run_server(served, model, request.host, request.port)
        # uvicorn exits in this way if it cannot listen.
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
    """Check that a server could listen on an address, before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Servers set this as well, so that they can be restarted immediately.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} on {host} is in use; give another --port") from error
        raise InputError(f"cannot listen on host {host} and port {port} ({error.strerror})") from error
