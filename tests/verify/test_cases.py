"""The cases: reproducible, named apart, within the declared ranges, and as many as were asked for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError
from diffdeploy.files import write_arrays
from diffdeploy.graphs import GraphSpec, Variant, graph_spec
from diffdeploy.runtime import check_inputs
from diffdeploy.verify.cases import Case
from diffdeploy.verify.sweep import Selection, golden_cases, select_cases
from diffdeploy.verify.user_inputs import read_inputs, write_inputs
from tests.support.blocks import make_config

CONFIG = make_config()
VARIANTS: tuple[Variant, ...] = ("plain", "masked", "cached")


def spec_of(variant: Variant, max_length: int = 70) -> GraphSpec:
    return graph_spec(variant, CONFIG, dtype="float32", max_batch_size=4, max_sequence_length=max_length)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_length", [4, 5, 70, 300])
@pytest.mark.parametrize("selection", ["quick", "full", 150], ids=str)
def test_every_input_is_what_the_graph_declares(variant: Variant, max_length: int, selection: Selection) -> None:
    spec = spec_of(variant, max_length)
    cases = select_cases(selection, CONFIG, spec, seed=3)
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        check_inputs(spec, case.inputs(spec))
        assert sum(case.chunks) in (0, case.sequence_length)


@pytest.mark.parametrize("variant", VARIANTS)
def test_selections_hold_each_other(variant: Variant) -> None:
    spec = spec_of(variant)
    quick, full = (select_cases(name, CONFIG, spec, 0) for name in ("quick", "full"))
    assert set(golden_cases(spec, 0)) <= set(quick) < set(full)
    assert select_cases(3, CONFIG, spec, 0) == full[:3]
    more = select_cases(len(full) + 20, CONFIG, spec, 0)
    assert more[: len(full)] == full
    assert [case.number for case in more[len(full) :]] == list(range(1, 21))
    with pytest.raises(InputError, match="number of cases is 0"):
        select_cases(0, CONFIG, spec, 0)


def test_a_case_gives_the_same_input_again_and_another_with_another_seed() -> None:
    spec, case = spec_of("cached"), Case(batch_size=2, sequence_length=3, past_length=4, seed=1)
    for name, array in case.inputs(spec).items():
        np.testing.assert_array_equal(array, case.inputs(spec)[name])
    other = replace(case, seed=2).inputs(spec)
    assert not np.array_equal(case.inputs(spec)["hidden_states"], other["hidden_states"])


def test_ids_say_what_a_case_is() -> None:
    case = Case(batch_size=2, sequence_length=9, seed=0)
    assert case.id == "B2-S9-normal"
    assert replace(case, past_length=5, mask="left", kind="tiny").id == "B2-P5-S9-left-tiny"
    assert replace(case, chunks=(4, 1, 4)).id == "B2-S9-in-4+1+4-normal"
    assert replace(case, row_by_row=True).id == "B2-S9-row-by-row-normal"
    assert replace(case, number=7, mask="hidden").id == "random7-B2-S9-hidden-normal"
    assert replace(case, past_length=5, mask="left").group == "past, left padding"
    assert replace(case, mask="hidden", kind="large").group == "hidden rows, large"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_inputs_that_are_written_come_back(suffix: str, tmp_path: Path) -> None:
    spec = spec_of("cached")
    cases = select_cases("quick", CONFIG, spec, 0)
    write_inputs(tmp_path / f"inputs{suffix}", cases, spec)
    read = {case.id: case for case in read_inputs(tmp_path / f"inputs{suffix}", spec)}
    assert sorted(read) == sorted(f"user-{case.id}" for case in cases)
    for case in cases:
        for name, array in case.inputs(spec).items():
            np.testing.assert_array_equal(read[f"user-{case.id}"].inputs(spec)[name], array)


def test_a_file_of_one_case_is_named_by_its_sizes(tmp_path: Path) -> None:
    spec = spec_of("cached")
    write_arrays(tmp_path / "x.npz", Case(batch_size=2, sequence_length=3, past_length=4, seed=1).inputs(spec))
    assert [case.id for case in read_inputs(tmp_path / "x.npz", spec)] == ["user-B2-P4-S3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_state": np.zeros(1)}, "holds hidden_state; accepted are the inputs of the graph, hidden_states, att"),
        ({"hidden_states": np.zeros((2, 3, 24))}, "hidden_states has dtype float64; accepted is float32"),
        ({"hidden_states": np.zeros((2, 3, 25), np.float32)}, "hidden_states has shape"),
        ({"hidden_states": np.zeros((5, 3, 24), np.float32)}, "is 5; accepted is 1 to 4"),
        ({"attention_mask": np.full((2, 7), 3)}, "holds numbers from 3 to 3; accepted are 0 to 1"),
        ({"attention_mask": np.ones((2, 6), np.int64)}, "total_sequence_length is 6; accepted is"),
        ({"attention_mask": None}, r"inputs are \['hidden_states', .*; accepted are \['attention_mask', "),
    ],
    ids=["name", "dtype", "width", "batch", "values", "sum", "missing"],
)
def test_inputs_that_the_graph_does_not_accept(changes: dict[str, Array | None], message: str, tmp_path: Path) -> None:
    spec = spec_of("cached")
    good = Case(batch_size=2, sequence_length=3, past_length=4, seed=1).inputs(spec)
    arrays: dict[str, Array | None] = {**good, **changes}
    write_arrays(tmp_path / "x.npz", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message):
        read_inputs(tmp_path / "x.npz", spec)


def test_files_that_are_no_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("empty.npz", "holds no array"),
        ("bad.npz", "cannot be read as .npz"),
        ("bad.safetensors", "cannot be read as .safetensors"),
        ("none.npz", "does not exist"),
        ("x.json", "accepted is .safetensors or .npz"),
    ):
        with pytest.raises(InputError, match=message):
            read_inputs(tmp_path / name, spec_of("plain"))
