"""Faults in the files of a bundle: damaged, stale, of another block, or promising what the artifact does not hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import GOLDEN, MANIFEST, WEIGHTS, Manifest
from diffdeploy.config import AnyConfig, RopeConfig
from diffdeploy.graphs import Range
from diffdeploy.verify.faults.base import Fault, Subject, When, all_of
from diffdeploy.verify.faults.conditions import grouped, has_rope, several_pairs, version_1
from diffdeploy.verify.faults.constants import next_bit
from diffdeploy.verify.stages import Stage

__all__ = ["BUNDLE_FAULTS"]


def _fault(
    name: str,
    breaks: str,
    inject: Callable[[Subject], None],
    *conditions: When,
    stage: Stage | None = None,
    signed: bool = True,
) -> Fault:
    return Fault(
        name=name,
        place="bundle",
        breaks=breaks,
        stage=stage,
        inject=inject,
        applies=all_of(*conditions),
        signed=signed,
    )


def _artifact(subject: Subject) -> str:
    """The largest file that only the artifact has."""
    others = (WEIGHTS, GOLDEN, MANIFEST, "verification.json")
    names = [name for name in subject.manifest.files if name not in others]
    return max(names, key=lambda name: subject.manifest.files[name].size)


def _change_a_byte(subject: Subject) -> None:
    path = subject.path / _artifact(subject)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _remove_weights(subject: Subject) -> None:
    (subject.path / WEIGHTS).unlink()


def _leave_a_file(subject: Subject) -> None:
    (subject.path / "notes.txt").write_text("left over")


def _link_weights(subject: Subject) -> None:
    target = subject.path.parent / "weights-elsewhere"
    (subject.path / WEIGHTS).rename(target)
    (subject.path / WEIGHTS).symlink_to(target)


def _truncate(subject: Subject) -> None:
    path = subject.path / _artifact(subject)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit_arrays(subject: Subject, file: str, edit: Callable[[dict[str, Array]], None]) -> None:
    import safetensors.numpy

    from diffdeploy.arrays import read_safetensors

    arrays = read_safetensors(subject.path / file)
    edit(arrays)
    (subject.path / file).write_bytes(safetensors.numpy.save(arrays))


def _one_bit_in_the_weights_file(subject: Subject) -> None:
    def edit(arrays: dict[str, Array]) -> None:
        arrays["v_proj.weight"] = next_bit(arrays["v_proj.weight"])

    _edit_arrays(subject, WEIGHTS, edit)


def _weights_file_of_another_block(subject: Subject) -> None:
    def edit(arrays: dict[str, Array]) -> None:
        arrays["q_proj.weight"] = np.ascontiguousarray(arrays["q_proj.weight"][::-1])

    _edit_arrays(subject, WEIGHTS, edit)


def _golden_output_off(subject: Subject) -> None:
    def edit(arrays: dict[str, Array]) -> None:
        name = next(name for name in arrays if name.endswith(".output"))
        arrays[name] = arrays[name] + 1e-6 * np.abs(arrays[name]).max()

    _edit_arrays(subject, GOLDEN, edit)


def _edit_manifest(subject: Subject, manifest: Manifest) -> None:
    (subject.path / MANIFEST).write_bytes(manifest.to_bytes())


def _names_config(change: Callable[[Any], AnyConfig]) -> Callable[[Subject], None]:
    """The manifest says another config; weights and artifact are the old ones."""

    def inject(subject: Subject) -> None:
        _edit_manifest(subject, subject.manifest.model_copy(update={"config": change(subject.config)}))

    return inject


def _other_theta(config: AnyConfig) -> AnyConfig:
    assert config.rope is not None
    return replace(config, rope=RopeConfig(style=config.rope.style, theta=2 * config.rope.theta))


def _promise_longer_sequences(subject: Subject) -> None:
    spec = subject.spec
    axes = {name: Range(min=r.min, max=r.max if name == "batch_size" else 2 * r.max) for name, r in spec.axes.items()}
    _edit_manifest(subject, subject.manifest.model_copy(update={"graph": spec.model_copy(update={"axes": axes})}))


def _stale_external_data(subject: Subject) -> None:
    """The model is newer than the file with its weights, where an earlier export's lie."""
    import onnx

    path = subject.path / "model.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    data = np.fromfile(subject.path / "model.onnx.data", dtype=np.float32)
    (np.where(np.isfinite(data), data * np.float32(1.01), data)).astype(np.float32).tofile(
        subject.path / "model.onnx.data"
    )


def _package_of_other_weights(subject: Subject) -> None:
    from diffdeploy.verify.faults.formats.aoti import edit_metadata

    edit_metadata(subject.path, {"weights_sha256": "0" * 64})


def _package_of_one_attention(subject: Subject) -> None:
    from diffdeploy.verify.faults.formats.aoti import edit_source

    edit_source(subject.path, rb"(aoti_torch_\w*?)scaled_dot_product", rb"\1another_product")


def _is(*formats: str) -> When:
    return lambda subject: subject.manifest.format in formats


def _inline_float32(subject: Subject) -> bool:
    return subject.spec.dtype == "float32" and "model.onnx.data" not in subject.manifest.files


BUNDLE_FAULTS = [
    _fault("byte_changed", "one bit of the artifact, with the old digests", _change_a_byte, signed=False),
    _fault("weights_missing", "weights.safetensors is not there", _remove_weights, signed=False),
    _fault("file_left_over", "a file that the manifest does not list", _leave_a_file, signed=False),
    _fault("weights_are_a_link", "weights.safetensors leads out of the bundle", _link_weights, signed=False),
    _fault("artifact_truncated", "half of the artifact", _truncate),
    _fault(
        "weights_file_off_by_one_bit",
        "one weight in weights.safetensors is the next number",
        _one_bit_in_the_weights_file,
    ),
    _fault("weights_file_of_another_block", "weights.safetensors has another q_proj", _weights_file_of_another_block),
    _fault(
        "golden_output_off_by_a_millionth", "an exact output in golden.safetensors is not exact", _golden_output_off
    ),
    _fault(
        "manifest_of_another_layer",
        "the manifest says another lambda_init",
        _names_config(lambda config: replace(config, lambda_init=config.lambda_init + 0.05)),
        version_1,
        stage=Stage.LAMBDA,
    ),
    _fault(
        "manifest_of_another_eps",
        "the manifest says ten times the epsilon",
        _names_config(lambda config: replace(config, norm_eps=10 * config.norm_eps)),
        version_1,
        stage=Stage.NORM,
    ),
    _fault(
        "manifest_of_another_theta",
        "the manifest says twice the rotary base",
        _names_config(_other_theta),
        has_rope,
        several_pairs,
        stage=Stage.ROPE,
    ),
    _fault(
        "manifest_of_another_key_map",
        "the manifest says the other meaning of grouped queries",
        _names_config(
            lambda config: replace(config, gqa_layout="legacy" if config.gqa_layout == "canonical" else "canonical")
        ),
        version_1,
        grouped,
        stage=Stage.SIGNAL,
    ),
    _fault(
        "manifest_promises_longer_sequences",
        "the manifest says twice the longest sequence",
        _promise_longer_sequences,
        has_rope,
        _is("onnx", "pt2"),
    ),
    _fault(
        "onnx_stale_external_data",
        "weights in a file of an earlier export",
        _stale_external_data,
        _is("onnx"),
        _inline_float32,
    ),
    _fault(
        "aoti_package_of_other_weights",
        "compiled from other weights, by its metadata",
        _package_of_other_weights,
        _is("aoti"),
    ),
    _fault(
        "aoti_package_of_one_attention",
        "compiled from one attention, by the source in it",
        _package_of_one_attention,
        _is("aoti"),
    ),
]
