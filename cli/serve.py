"""``diffdeploy serve``: serves a bundle with a third-party server of the Open Inference Protocol."""

from pathlib import Path
from typing import Annotated

import typer

from diffdeploy.cli import console
from diffdeploy.cli.shared_options import Device, PublicKey, Threads, Trust

__all__ = ["serve"]


def serve(
    bundle: Annotated[Path, typer.Argument(help="Directory that diffdeploy export made.")],
    server: Annotated[
        str | None, typer.Option(help="kserve or mlserver.", show_default="the one that is installed")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port.")] = 8080,
    device: Device = None,
    threads: Threads = None,
    trust: Trust = False,
    public_key: PublicKey = None,
) -> int:
    """Serve a bundle over the Open Inference Protocol (version 2) until Ctrl-C, with KServe or MLServer.

    A model generates tokens if a request has the parameter max_new_tokens; docs/deploy.md shows requests.
    """
    from diffdeploy.engines.oip import ServeRequest
    from diffdeploy.engines.oip import serve as serve_bundle
    from diffdeploy.formats import RunOptions

    options = RunOptions(device=device, threads=threads, trust=trust, public_key=public_key)
    request = ServeRequest(bundle=bundle, options=options, host=host, port=port, server=server)
    serve_bundle(request, ready=console.note)
    return 0
