"""Registration of faulty blocks in the table: each is exported with the weights and the options of a correct bundle."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from diffdeploy.arrays import to_tensor
from diffdeploy.config import AnyConfig
from diffdeploy.exporters import ExportOptions, lower_block
from diffdeploy.graphs import Stage
from diffdeploy.modules import AttentionBlock, block_class
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of

__all__ = ["BLOCK_FAULTS", "config_fault", "faulty", "is_traced", "options_of"]

BLOCK_FAULTS: list[Fault] = []

Kind = TypeVar("Kind", bound=type[Steps])


def faulty(name: str, breaks: str, stage: Stage | None, *conditions: When, family: str = "") -> Callable[[Kind], Kind]:
    """Register a class with one wrong step; see `Fault` for the arguments."""

    def enter(step: Kind) -> Kind:
        def inject(target: FaultTarget) -> None:
            kind: Any = type(step.__name__, (step, block_class(target.config)), {})
            _export(target, kind, target.config)

        BLOCK_FAULTS.append(
            Fault(
                name=name,
                place="block",
                breaks=breaks,
                stage=stage,
                inject=inject,
                applies=all_of(is_traced, *conditions),
                family=family,
            )
        )
        return step

    return enter


def config_fault(
    name: str, stage: Stage | None, breaks: str, change: Callable[[Any], AnyConfig], *conditions: When
) -> None:
    """Register a correct block with another config."""

    def inject(target: FaultTarget) -> None:
        _export(target, block_class(target.config), change(target.config))

    def differs(target: FaultTarget) -> bool:
        return change(target.config) != target.config

    BLOCK_FAULTS.append(
        Fault(
            name=name,
            place="block",
            breaks=breaks,
            stage=stage,
            inject=inject,
            applies=all_of(*conditions, differs),
        )
    )


def is_traced(target: FaultTarget) -> bool:
    """True if a wrong step results in a wrong artifact."""
    return target.format.traces_block(target.manifest)


def _export(target: FaultTarget, kind: type[AttentionBlock], config: AnyConfig) -> None:
    """Replace the artifact with one that is lowered from another block, with the bundle's options."""
    spec, recorded = target.spec, target.manifest.options
    block = kind.from_weights(
        config,
        {name: to_tensor(array) for name, array in target.weights.items()},
        impl=recorded.attention_impl,
        max_positions=spec.axes["sequence_length"].max,
        dtype=getattr(torch, spec.dtype),
    )
    lower_block(block, spec, target.path, options_of(target))


def options_of(target: FaultTarget) -> ExportOptions:
    """Options with which a bundle was exported."""
    spec, recorded = target.spec, target.manifest.options
    return ExportOptions(
        format=target.manifest.format,
        graph=spec.variant,
        dtype=spec.dtype,
        device=recorded.device or "cpu",
        opset=recorded.opset,
        onnx_flavor=recorded.flavor,
        impl=recorded.attention_impl,
        logits=spec.logits,
    )
