"""``diffdeploy sign``: signs a whole bundle with a private key."""

from pathlib import Path
from typing import Annotated

import typer

from diffdeploy.cli import console
from diffdeploy.cli.shared_options import AsJson

__all__ = ["sign"]


def sign(
    bundle: Annotated[Path, typer.Argument(help="Directory that diffdeploy export made.")],
    private_key: Annotated[
        Path, typer.Option(help="Elliptic-curve key in PEM, without a password: P-256, P-384 or P-521.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing signature.")] = False,
    as_json: AsJson = False,
) -> int:
    """Sign every file of a bundle, in the format of OpenSSF model-signing, without going online.

    Anyone with the public key can check the signature: verify, run, generate and bench take the key as --public-key,
    and load() takes it as public_key.
    """
    from diffdeploy.bundle import MANIFEST, open_bundle, sign_bundle

    opened = open_bundle(bundle)
    signature = sign_bundle(opened, private_key, force=force)
    files = sorted([MANIFEST, *opened.manifest.files])
    if as_json:
        fields = {"status": "signed", "bundle": str(bundle), "signature": str(signature), "files": files}
        console.print_json(fields)
        return 0
    console.print_text(f"signed {bundle}: {signature} covers its {len(files)} other files")
    console.note(f"check it with diffdeploy verify {bundle} --public-key KEY, with the public half of {private_key}")
    return 0
