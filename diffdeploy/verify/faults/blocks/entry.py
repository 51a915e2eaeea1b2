"""Entering faulty blocks into the table: each is exported beside right weights, as its bundle was."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from diffdeploy.arrays import to_tensor
from diffdeploy.config import AnyConfig
from diffdeploy.modules import AttentionBlock, block_class
from diffdeploy.verify.faults.base import Fault, Subject, When, all_of
from diffdeploy.verify.faults.blocks.steps import Steps
from diffdeploy.verify.stages import Stage

__all__ = ["BLOCK_FAULTS", "config_fault", "faulty"]

BLOCK_FAULTS: list[Fault] = []

Kind = TypeVar("Kind", bound=type[Steps])


def faulty(stage: Stage | None, *conditions: When) -> Callable[[Kind], Kind]:
    """Enter a class with one wrong step; its name is the fault's, and its docstring says what it breaks."""

    def enter(step: Kind) -> Kind:
        def inject(subject: Subject) -> None:
            kind: Any = type(step.__name__, (step, block_class(subject.config)), {})
            _export(subject, kind, subject.config)

        BLOCK_FAULTS.append(
            Fault(
                name=re.sub(r"(?<!^)(?=[A-Z])", "_", step.__name__).lower(),
                place="block",
                breaks=_clause(step.__doc__ or ""),
                stage=stage,
                inject=inject,
                applies=all_of(_can_be_exported, _is_traced, *conditions),
            )
        )
        return step

    return enter


def config_fault(
    name: str, stage: Stage | None, breaks: str, change: Callable[[Any], AnyConfig], *conditions: When
) -> None:
    """Enter a right block of another config."""

    def inject(subject: Subject) -> None:
        _export(subject, block_class(subject.config), change(subject.config))

    def differs(subject: Subject) -> bool:
        return change(subject.config) != subject.config

    BLOCK_FAULTS.append(
        Fault(
            name=name,
            place="block",
            breaks=breaks,
            stage=stage,
            inject=inject,
            applies=all_of(_can_be_exported, *conditions, differs),
        )
    )


def _clause(docstring: str) -> str:
    """The first sentence of a docstring, as the other tables have it."""
    first = docstring.strip().splitlines()[0].rstrip(".")
    return first[0].lower() + first[1:]


def _can_be_exported(subject: Subject) -> bool:
    return subject.lower is not None


def _is_traced(subject: Subject) -> bool:
    """An export traces the block as it is; onnxruntime's flavor writes its steps down itself."""
    return subject.manifest.options.get("flavor") != "ort"


def _export(subject: Subject, kind: type[AttentionBlock], config: AnyConfig) -> None:
    assert subject.lower is not None
    block = kind.from_weights(
        config,
        {name: to_tensor(array) for name, array in subject.weights.items()},
        impl=str(subject.manifest.options["attention_impl"]),
        max_positions=subject.spec.axes["sequence_length"].max,
        dtype=getattr(torch, subject.spec.dtype),
    )
    subject.lower(block, subject.manifest, subject.path)
