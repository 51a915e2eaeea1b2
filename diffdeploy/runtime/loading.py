"""`load`, which opens a bundle with the backend of its format after checking that it can run here and is trusted."""

import re
import warnings
from pathlib import Path

from diffdeploy.bundle import Bundle, Manifest, is_own_export, open_bundle
from diffdeploy.errors import InputError, IntegrityError, UnavailableError, UnverifiedWarning
from diffdeploy.formats import Format, RunOptions, RuntimeName, find_format, format_names
from diffdeploy.runtime.machine import differences, this_machine
from diffdeploy.runtime.runtime import Runtime
from diffdeploy.versions import imported_version, installed_versions, release

__all__ = ["device_of", "least_versions", "load", "open_runtime", "require_runnable", "require_trusted"]


def device_of(manifest: Manifest, options: RunOptions) -> str:
    """Device that a bundle runs on: the requested one, else the one it was made for, else the CPU.

    Raises:
        InputError: the device has an invalid name, or is not of the kind that the artifact was compiled for.
    """
    made_for = manifest.options.device
    device = options.device or made_for or "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device is {device!r}; accepted: cpu, cuda or cuda:N")
    if made_for is not None and device.split(":")[0] != made_for and not options.recompile:
        raise InputError(
            f"device is {device}, but this {manifest.format} bundle was made for {made_for}; export another"
        )
    return device


def require_runnable(manifest: Manifest, options: RunOptions) -> None:
    """Check that a bundle can be run here.

    Raises:
        InputError: the format does not support one of the options.
        UnavailableError: this version does not know the format, its backend or device is missing, the backend is too
            old to compute the artifact correctly, or the artifact was compiled for another machine.
    """
    found = _format_of(manifest)
    # Errors that occur on every machine come before those that are specific to this one.
    found.check_run_options(manifest, options)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; accepted: 1 or more")
    device = device_of(manifest, options)
    if reason := found.why_not_run(device, manifest.graph.dtype, runtime=options.runtime):
        raise UnavailableError(reason)
    # Another runtime replaces the package that could be too old.
    if options.runtime == "native" and (reason := _why_too_old(found, manifest)):
        raise UnavailableError(reason)
    # Code that is recompiled here fits this machine, whatever the bundle was compiled for.
    if not manifest.made_for or options.recompile:
        return
    if differing := differences(manifest.made_for, this_machine(device)):
        way_out = "--recompile compiles it again here" if _can_recompile(found, manifest) else "export it again here"
        raise UnavailableError(f"this {manifest.format} bundle was compiled for {'; '.join(differing)}; {way_out}")


def require_trusted(bundle: Bundle, options: RunOptions) -> None:
    """Check that code in a bundle comes from this user, or that the user trusts it or its signer.

    Raises:
        IntegrityError: the bundle runs code when it is loaded, was not exported by this user on this machine, was not
            opened with the key of its signer, and the user did not choose to trust it.
    """
    executes = _format_of(bundle.manifest).executes
    # If the block is recompiled, no code from the bundle runs.
    if executes is None or options.trust or options.recompile:
        return
    # The option only states the key to check; the bundle shows that the check was made.
    if bundle.signature_checked or is_own_export(bundle.path):
        return
    raise IntegrityError(
        f"{bundle.path} is a bundle of format {bundle.manifest.format}, whose {executes} would run with your rights, "
        "but it is not one of your own exports on this machine; give --trust, or trust=True, if you trust its maker, "
        "or --public-key with the key that signed it"
    )


def _format_of(manifest: Manifest) -> Format:
    if (found := find_format(manifest.format)) is None:
        raise UnavailableError(
            f"this version cannot run format {manifest.format!r}; it runs {', '.join(format_names())}"
        )
    found.check_manifest(manifest)
    return found


def least_versions(manifest: Manifest) -> dict[str, str]:
    """Lowest version of each package that computes an artifact correctly, by import name.

    Args:
        manifest: manifest of the bundle; if it and the tables of its format differ, the higher version applies.
    """
    found = find_format(manifest.format)
    known = {} if found is None else found.least_versions(manifest)
    return {
        name: max((side[name] for side in (known, manifest.requires or {}) if name in side), key=release)
        for name in sorted({*known, *(manifest.requires or {})})
    }


def _why_too_old(found: Format, manifest: Manifest) -> str | None:
    least = least_versions(manifest).get(found.package)
    if least is None or release(installed := imported_version(found.package)) >= release(least):
        return None
    # Named as in pip, since the package may come from a distribution with another name.
    names = [name for name in installed_versions(found.distributions) if name.startswith(found.package)]
    return (
        f"{found.package} {installed} is installed, but this {manifest.format} bundle needs {least} or newer for "
        f"correct results; pip install '{names[0] if names else found.package}>={least}'"
    )


def _can_recompile(found: Format, manifest: Manifest) -> bool:
    try:
        found.check_run_options(manifest, RunOptions(recompile=True))
    except InputError:
        return False
    return True


def load(
    path: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    runtime: RuntimeName = "native",
    recompile: bool = False,
    trust: bool = False,
    public_key: str | Path | None = None,
    keep_memory: bool = True,
) -> Runtime:
    """Open a bundle to run it, after checking its digests. A bundle exported without verification causes a warning.

    Args:
        path: directory of the bundle.
        device: device to run on; see `RunOptions` for this and the other options.
        threads: number of CPU threads of the backend.
        runtime: ``native`` for the format's own runtime; for an ONNX bundle, also ``reference`` (`onnx.reference`) or
            ``openvino``.
        recompile: true to recompile the block.
        trust: true to run code from a foreign bundle: the machine code or pickles of some formats.
        public_key: file of the public key that the bundle's signature must match; the bundle is then trusted.
        keep_memory: false to free a call's memory on the CPU where onnxruntime would keep it for the next call.

    Raises:
        InputError: there is no bundle, the format does not support an option, or the file is not a key.
        IntegrityError: the bundle is not what was exported or signed, or it runs code and is not trusted.
        UnavailableError: the backend or the device is missing, the bundle was made for another machine, or a key is
            given, but model-signing is not installed.
        ExportError: the backend cannot load the artifact.
    """
    options = RunOptions(
        device=device,
        threads=threads,
        runtime=runtime,
        recompile=recompile,
        trust=trust,
        public_key=public_key,
        keep_memory=keep_memory,
    )
    loaded = open_runtime(path, options)
    if not loaded.verified:
        warnings.warn(
            f"{path} was exported without verification, so it may not compute what its checkpoint does; run "
            f"diffdeploy verify {path}",
            UnverifiedWarning,
            stacklevel=2,
        )
    return loaded


def open_runtime(path: str | Path, options: RunOptions) -> Runtime:
    """Open a bundle like `load`, but without its warning, for callers that are about to verify the bundle.

    Raises:
        DiffDeployError: see `load`.
    """
    bundle = open_bundle(path, options.public_key)
    require_runnable(bundle.manifest, options)
    require_trusted(bundle, options)
    where = device_of(bundle.manifest, options)
    return Runtime(bundle, _format_of(bundle.manifest).open(bundle, options, where), where)
