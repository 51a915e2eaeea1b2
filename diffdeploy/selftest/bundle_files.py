"""Faults in a bundle's files: they are damaged, stale or of another block, or declare what the artifact cannot do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import GOLDEN, MANIFEST, REPORT, WEIGHTS, Manifest
from diffdeploy.config import AnyConfig, RopeConfig
from diffdeploy.graphs import Range, Stage
from diffdeploy.selftest.conditions import grouped, has_norm, has_rope, several_pairs, version_1
from diffdeploy.selftest.constant_fault import next_bit
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of

__all__ = ["BUNDLE_FILE_FAULTS"]


def _fault(
    name: str,
    breaks: str,
    inject: Callable[[FaultTarget], None],
    *conditions: When,
    stage: Stage | None = None,
    new_digests: bool = True,
    of_models: bool = False,
) -> Fault:
    return Fault(
        name=name,
        place="bundle",
        breaks=breaks,
        stage=stage,
        inject=inject,
        applies=all_of(*conditions),
        new_digests=new_digests,
        of_models=of_models,
    )


def _artifact(target: FaultTarget) -> str:
    """Name of the largest file that belongs only to the artifact."""
    others = (WEIGHTS, GOLDEN, MANIFEST, REPORT)
    names = [name for name in target.manifest.files if name not in others]
    return max(names, key=lambda name: target.manifest.files[name].size)


def _change_a_byte(target: FaultTarget) -> None:
    path = target.path / _artifact(target)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _remove_weights(target: FaultTarget) -> None:
    (target.path / WEIGHTS).unlink()


def _leave_a_file(target: FaultTarget) -> None:
    (target.path / "notes.txt").write_text("left over")


def _link_weights(target: FaultTarget) -> None:
    # The bytes are identical, so that only the link itself can be detected.
    elsewhere = target.path.parent / "weights-elsewhere"
    (target.path / WEIGHTS).rename(elsewhere)
    (target.path / WEIGHTS).symlink_to(elsewhere)


def _truncate(target: FaultTarget) -> None:
    path = target.path / _artifact(target)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit_arrays(target: FaultTarget, file: str, edit: Callable[[dict[str, Array]], None]) -> None:
    import safetensors.numpy

    from diffdeploy.arrays import read_safetensors

    arrays = read_safetensors(target.path / file)
    edit(arrays)
    (target.path / file).write_bytes(safetensors.numpy.save(arrays))


def _last(arrays: dict[str, Array], weight: str) -> str:
    """Name that ends with that of a weight, or its scales if it is quantised; in a model, that of the last layer."""
    return [name for name in arrays if name.removesuffix(".scales").endswith(weight)][-1]


def _one_bit_in_the_weights_file(target: FaultTarget) -> None:
    def edit(arrays: dict[str, Array]) -> None:
        # With new digests, so that only a comparison with the artifact can detect it.
        name = _last(arrays, "v_proj.weight")
        arrays[name] = next_bit(arrays[name])

    _edit_arrays(target, WEIGHTS, edit)


def _weights_file_of_another_block(target: FaultTarget) -> None:
    def edit(arrays: dict[str, Array]) -> None:
        name = _last(arrays, "q_proj.weight")
        arrays[name] = np.ascontiguousarray(arrays[name][::-1])

    _edit_arrays(target, WEIGHTS, edit)


def _golden_output_off(target: FaultTarget) -> None:
    def edit(arrays: dict[str, Array]) -> None:
        name = next(name for name in arrays if name.endswith(f".{target.spec.main_output}"))
        arrays[name] = arrays[name] + 1e-6 * np.abs(arrays[name]).max()

    _edit_arrays(target, GOLDEN, edit)


def _edit_manifest(target: FaultTarget, manifest: Manifest) -> None:
    # `write_manifest` is not used here, since it is called after these faults to write new digests.
    (target.path / MANIFEST).write_bytes(manifest.to_bytes())


def _names_config(change: Callable[[Any], AnyConfig]) -> Callable[[FaultTarget], None]:
    """Change the config in the manifest, but neither weights nor artifact."""

    def inject(target: FaultTarget) -> None:
        _edit_manifest(target, target.manifest.model_copy(update={"config": change(target.config)}))

    return inject


def _other_theta(config: AnyConfig) -> AnyConfig:
    assert config.rope is not None
    return replace(config, rope=RopeConfig(style=config.rope.style, theta=2 * config.rope.theta))


def _promise_longer_sequences(target: FaultTarget) -> None:
    spec = target.spec
    # Only the lengths are changed, so that the rotary tables are too short.
    axes = {name: Range(min=r.min, max=r.max if name == "batch_size" else 2 * r.max) for name, r in spec.axes.items()}
    _edit_manifest(target, target.manifest.model_copy(update={"graph": spec.model_copy(update={"axes": axes})}))


def _artifact_holds_ranges(target: FaultTarget) -> bool:
    return target.format.holds_ranges


BUNDLE_FILE_FAULTS = [
    _fault(
        "byte_changed",
        "one bit of the artifact is flipped, but the digests are the old ones",
        _change_a_byte,
        new_digests=False,
        of_models=True,
    ),
    _fault("weights_missing", "weights.safetensors is missing", _remove_weights, new_digests=False, of_models=True),
    _fault(
        "file_left_over", "a file that the manifest does not list", _leave_a_file, new_digests=False, of_models=True
    ),
    _fault(
        "weights_are_a_link",
        "weights.safetensors is a link out of the bundle",
        _link_weights,
        new_digests=False,
        of_models=True,
    ),
    _fault("artifact_truncated", "only the first half of the artifact is left", _truncate, of_models=True),
    _fault(
        "weights_file_off_by_one_bit",
        "one weight in weights.safetensors is changed to the next representable number",
        _one_bit_in_the_weights_file,
        of_models=True,
    ),
    _fault(
        "weights_file_of_another_block",
        "weights.safetensors has another q_proj",
        _weights_file_of_another_block,
        of_models=True,
    ),
    _fault(
        "golden_output_off_by_a_millionth",
        "an exact output in golden.safetensors is wrong",
        _golden_output_off,
        of_models=True,
    ),
    _fault(
        "manifest_of_another_layer",
        "the manifest states another lambda_init",
        # About the difference that one layer makes at a depth of 4.
        _names_config(lambda config: replace(config, lambda_init=config.lambda_init + 0.05)),
        version_1,
        stage=Stage.LAMBDA,
    ),
    _fault(
        "manifest_of_another_eps",
        "the manifest states ten times the epsilon",
        _names_config(lambda config: replace(config, norm_eps=10 * config.norm_eps)),
        has_norm,
        stage=Stage.NORM,
    ),
    _fault(
        "manifest_of_another_theta",
        "the manifest states twice the rotary base",
        _names_config(_other_theta),
        has_rope,
        several_pairs,
        stage=Stage.ROPE,
    ),
    _fault(
        "manifest_of_another_key_map",
        "the manifest states the other key map of grouped queries",
        _names_config(
            lambda config: replace(config, gqa_layout="legacy" if config.gqa_layout == "canonical" else "canonical")
        ),
        version_1,
        grouped,
        stage=Stage.SIGNAL,
    ),
    _fault(
        "manifest_promises_longer_sequences",
        "the manifest states twice the maximum sequence length",
        _promise_longer_sequences,
        has_rope,
        _artifact_holds_ranges,
        of_models=True,
    ),
]
