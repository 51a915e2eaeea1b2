"""`load`: from a directory to a runtime, with the backend of its format; and what can be run here."""

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
    """Where a bundle is run: as asked for, else where it was made for, else on the CPU.

    Raises:
        InputError: not the name of a device, or not the kind of device that the artifact was compiled for.
    """
    made_for = manifest.options.device
    device = options.device or made_for or "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device is {device!r}; accepted is cpu, cuda or cuda:N")
    if made_for is not None and device.split(":")[0] != made_for and not options.recompile:
        raise InputError(
            f"device is {device}, but this {manifest.format} bundle was made for {made_for}; export another"
        )
    return device


def require_runnable(manifest: Manifest, options: RunOptions) -> None:
    """Check that a bundle can be run here.

    Raises:
        InputError: an option that the format does not have.
        UnavailableError: this version does not know the format, its backend or device is not here, the backend is too
            old to compute the artifact rightly, or the artifact was compiled for another machine.
    """
    found = _format_of(manifest)
    # What is wrong on every machine comes before what this one lacks.
    found.check_run_options(manifest, options)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; accepted is 1 or more")
    device = device_of(manifest, options)
    if reason := found.why_not_run(device, manifest.graph.dtype, runtime=options.runtime):
        raise UnavailableError(reason)
    # Another runtime stands in for the package that could be too old.
    if options.runtime == "native" and (reason := _why_too_old(found, manifest)):
        raise UnavailableError(reason)
    # What is compiled here fits this machine, whatever it was compiled for before.
    if not manifest.made_for or options.recompile:
        return
    if differing := differences(manifest.made_for, this_machine(device)):
        way_out = "--recompile compiles it afresh here" if _can_recompile(found, manifest) else "export it again here"
        raise UnavailableError(f"this {manifest.format} bundle was compiled for {'; '.join(differing)}; {way_out}")


def require_trusted(bundle: Bundle, options: RunOptions) -> None:
    """See that what a bundle runs when it is loaded comes from here, or that the user trusts it or its signer.

    Raises:
        IntegrityError: it runs code, no export of this user on this machine made it, it was not opened with the key of
            its signer, and nobody said to trust it.
    """
    executes = _format_of(bundle.manifest).executes
    # Compiled afresh, nothing that the bundle brought runs.
    if executes is None or options.trust or options.recompile:
        return
    # Not the option, which says what is asked for and not that it was checked.
    if bundle.signature_checked or is_own_export(bundle.path):
        return
    raise IntegrityError(
        f"{bundle.path} is a bundle of format {bundle.manifest.format}, whose {executes} would run with your rights, "
        "and no export of yours on this machine made it; give --trust, or trust=True, if you trust whoever did, or "
        "--public-key with the key that signed it"
    )


def _format_of(manifest: Manifest) -> Format:
    if (found := find_format(manifest.format)) is None:
        raise UnavailableError(
            f"this version cannot run format {manifest.format!r}; it runs {', '.join(format_names())}"
        )
    found.check_manifest(manifest)
    return found


def least_versions(manifest: Manifest) -> dict[str, str]:
    """Least version of each package that computes an artifact rightly, by import name.

    Args:
        manifest: of the bundle; what it requires counts as far as the tables of its format do not ask for more.
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
    # As pip knows it: the package may come from a build with another name.
    names = [name for name in installed_versions(found.distributions) if name.startswith(found.package)]
    return (
        f"{found.package} {installed} is installed, and this {manifest.format} bundle needs {least} or newer to be "
        f"computed rightly; pip install '{names[0] if names else found.package}>={least}'"
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
) -> Runtime:
    """Open a bundle for running; its digests are checked first. One that was never verified gives a warning.

    Args:
        path: the bundle's directory.
        device: see `RunOptions`, as for the other options.
        threads: of the backend.
        runtime: run ONNX with ``reference``, which is `onnx.reference`, or ``openvino``.
        recompile: compile afresh.
        trust: run what a bundle from elsewhere brings: the machine code or pickles of some formats.
        public_key: file of the key that must have signed the bundle; one that it signed is trusted.

    Raises:
        InputError: no bundle there, an option that it does not have, or a file that is no key.
        IntegrityError: the bundle is not what was exported, or signed by the key, or it runs code and is not trusted.
        UnavailableError: the backend or the device is not here, the bundle was made for another machine, or a key is
            given without model-signing.
        ExportError: the backend cannot load the artifact.
    """
    options = RunOptions(
        device=device,
        threads=threads,
        runtime=runtime,
        recompile=recompile,
        trust=trust,
        public_key=public_key,
    )
    loaded = open_runtime(path, options)
    if not loaded.verified:
        warnings.warn(
            f"{path} was exported without verification, so nothing says that it computes what its checkpoint does; run "
            f"diffdeploy verify {path}",
            UnverifiedWarning,
            stacklevel=2,
        )
    return loaded


def open_runtime(path: str | Path, options: RunOptions) -> Runtime:
    """`load` without its warning, for those who verify the bundle now.

    Raises:
        DiffDeployError: see `load`.
    """
    bundle = open_bundle(path, options.public_key)
    require_runnable(bundle.manifest, options)
    require_trusted(bundle, options)
    where = device_of(bundle.manifest, options)
    return Runtime(bundle, _format_of(bundle.manifest).open(bundle, options, where), where)
