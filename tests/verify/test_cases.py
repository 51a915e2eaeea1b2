"""The cases: reproducible, named apart, within the declared ranges, and as many as were asked for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError
from diffdeploy.files import write_arrays
from diffdeploy.formats import Selection
from diffdeploy.graphs import GraphSpec, Range, Variant, graph_spec
from diffdeploy.runtime import check_inputs
from diffdeploy.verify.cases import Case, Kind, Mask
from diffdeploy.verify.coverage import covered
from diffdeploy.verify.sweep import golden_cases, select_cases
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
    numbers = [case.number for case in full if case.number]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [case.number for case in more[len(full) :]] == list(range(len(numbers) + 1, len(numbers) + 21))
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
    assert replace(case, batch_size=9, repeats=True, mask="mixed").id == "B9-S9-repeats-mixed-normal"
    assert replace(case, positions="drawn", mask="mixed").id == "B2-S9-mixed-positions-normal"
    assert replace(case, past_length=5, mask="left").group == "past, left padding"
    assert replace(case, mask="hidden", kind="large").group == "hidden rows, large"


def test_every_row_of_a_mixed_mask_hides_other_tokens() -> None:
    case = Case(batch_size=18, sequence_length=40, seed=0, mask="mixed")
    spec = graph_spec("masked", CONFIG, dtype="float32", max_batch_size=18, max_sequence_length=70)
    mask = case.inputs(spec)["attention_mask"]
    counts = (mask == 0).sum(axis=1)
    assert set(counts) == {1, 5, 20, 35, 39, 40}
    # Of each count one row at either end and one with holes.
    several = mask[(counts > 1) & (counts < 39)]
    starts, ends = several[:, 0] == 0, several[:, -1] == 0
    assert (starts & ~ends).any()
    assert (ends & ~starts).any()
    assert (np.abs(np.diff(several, axis=1)).sum(axis=1) > 1).any()


def test_drawn_positions_do_not_follow_from_the_mask() -> None:
    spec = spec_of("cached")
    case = Case(batch_size=3, sequence_length=20, past_length=9, seed=0, mask="mixed")
    counted, drawn = case.inputs(spec), replace(case, positions="drawn").inputs(spec)
    np.testing.assert_array_equal(counted["attention_mask"], drawn["attention_mask"])
    assert (counted["position_ids"] != drawn["position_ids"]).mean() > 0.8
    assert drawn["position_ids"].max() > 60
    assert (np.diff(drawn["position_ids"], axis=1) < 0).any()


@pytest.mark.parametrize("mask", ["none", "left", "right", "ragged", "mixed"])
@pytest.mark.parametrize(("length", "past"), [(1, 9), (7, 0), (20, 9)])
def test_drawn_positions_reach_both_ends_of_their_range(mask: Mask, length: int, past: int) -> None:
    spec = spec_of("cached")
    case = Case(
        batch_size=3, sequence_length=length, past_length=past, seed=0, mask=mask, kind="normal", positions="drawn"
    )
    inputs = case.inputs(spec)
    values = spec.inputs["position_ids"].values
    assert values is not None
    seen = inputs["position_ids"][inputs["attention_mask"][:, past:] == 1]
    assert seen.max() == values.max
    assert length == 1 or seen.min() == values.min


def states(kind: Kind, batch_size: int = 4, length: int = 50) -> Array:
    spec = graph_spec("plain", make_config(embed_dim=128), dtype="float32", max_batch_size=8, max_sequence_length=70)
    return Case(batch_size=batch_size, sequence_length=length, seed=0, kind=kind).inputs(spec)["hidden_states"]


def test_kinds_are_what_their_names_say() -> None:
    zero = (states("zeros") == 0).all(axis=2)
    assert zero.any(axis=1).all()
    assert not zero.all(axis=1).any()
    assert all(2 <= len(np.unique(row, axis=0)) <= 3 for row in states("repeated"))
    assert np.abs(states("offset").mean(axis=(0, 1))).max() > 5
    sizes = np.sqrt((states("outliers") ** 2).mean(axis=(0, 1)))
    assert ((sizes > 90) & (sizes < 2500)).sum() == 2
    assert np.median(sizes) < 1.2
    assert np.abs(states("heavy")).max() > 30
    of_rows = np.sqrt((states("scaled", batch_size=8) ** 2).mean(axis=(1, 2)))
    assert of_rows.min() < 1e-4
    assert of_rows.max() > 1e2
    of_tokens = np.sort(np.log10(np.sqrt((states("scales") ** 2).mean(axis=2)).reshape(-1)))
    assert np.diff(of_tokens).max() < 0.5
    assert [np.isnan(row).sum() for row in states("nan")] == [1, 0, 0, 0]
    assert [np.isinf(row).sum() for row in states("infinity")] == [1, 0, 0, 0]


def test_rows_of_a_large_batch_are_among_the_first_eight() -> None:
    spec = graph_spec("cached", CONFIG, dtype="float32", max_batch_size=30, max_sequence_length=70)
    case = Case(batch_size=30, sequence_length=3, past_length=4, seed=0, mask="mixed", repeats=True)
    sources = case.sources()
    assert list(sources[:8]) == list(range(8))
    assert len(set(sources[8:])) > 4
    for name, array in case.inputs(spec).items():
        np.testing.assert_array_equal(array, array[sources], err_msg=name)
    assert len(np.unique(case.inputs(spec)["hidden_states"], axis=0)) == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_full_sweep_leaves_no_part_of_a_range_out(variant: Variant) -> None:
    config = make_config(num_heads=32, num_kv_heads=32)
    spec = graph_spec(variant, config, dtype="float32", max_batch_size=32, max_sequence_length=2048)
    cases = select_cases("full", config, spec, 0)
    assert [part.untried_text for part in covered(spec, cases)] == [None] * len(spec.axes)
    assert {case.batch_size for case in cases} >= {*range(1, 9), 32}
    lengths = [case for case in cases if case.sequence_length > 129]
    assert len({case.sequence_length for case in lengths}) >= 4
    if variant != "plain":
        masks = {case.mask for case in lengths}
        assert "mixed" in masks
        assert {case.batch_size for case in cases if case.mask == "mixed"} >= {*range(3, 9), 32}
        assert any(case.positions == "drawn" for case in cases)
    if variant == "cached":
        decoding = [case for case in cases if case.sequence_length == 1 and case.past_length and case.mask == "mixed"]
        assert {case.batch_size for case in decoding} >= {1, *range(3, 9), 32}
        assert len({case.past_length for case in decoding}) >= 10


def test_what_is_not_tried_is_named() -> None:
    spec = spec_of("cached", 300)
    quick = {part.axis: part for part in covered(spec, select_cases("quick", CONFIG, spec, 0))}
    assert str(quick["sequence_length"].untried_text).endswith("130 to 300")
    assert quick["batch_size"].untried == []
    long = graph_spec("plain", CONFIG, dtype="float32", max_batch_size=4, max_sequence_length=100_000)
    (_, length) = covered(long, select_cases("full", CONFIG, long, 0))
    longest = max(case.sequence_length for case in select_cases("full", CONFIG, long, 0))
    assert length.untried_text == f"sequence_length {longest + 1} to 100000"
    assert length.compared_whole == Range(min=1, max=length.compared_whole.max)  # type: ignore[union-attr]
    assert length.compared_in_part is not None
    assert length.compared_in_part.max == longest
    assert covered(long, [])[0].untried_text == "batch_size 1 to 4"


def test_rows_and_chunks_count_as_they_are_fed() -> None:
    spec = spec_of("cached")
    alone = Case(batch_size=3, sequence_length=9, seed=0, row_by_row=True)
    (batch, length, past, total) = covered(spec, [alone, replace(alone, row_by_row=False, chunks=(4, 1, 4))])
    assert (batch.axis, batch.num_sizes) == ("batch_size", 2)
    assert (length.axis, length.num_sizes) == ("sequence_length", 3)
    assert (past.axis, past.num_sizes) == ("past_sequence_length", 3)
    assert (total.axis, total.num_sizes) == ("total_sequence_length", 3)


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
        ({"hidden_state": np.zeros(1)}, "holds hidden_state; accepted: the inputs of the graph, hidden_states, att"),
        ({"hidden_states": np.zeros((2, 3, 24))}, "hidden_states has dtype float64; accepted: float32"),
        ({"hidden_states": np.zeros((2, 3, 25), np.float32)}, "hidden_states has shape"),
        ({"hidden_states": np.zeros((5, 3, 24), np.float32)}, "is 5; accepted: 1 to 4"),
        ({"attention_mask": np.full((2, 7), 3)}, "holds numbers from 3 to 3; accepted: 0 to 1"),
        ({"attention_mask": np.ones((2, 6), np.int64)}, "total_sequence_length is 6; accepted:"),
        ({"attention_mask": None}, r"inputs are \['hidden_states', .*; accepted: \['attention_mask', "),
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
        ("x.json", "accepted: .safetensors or .npz"),
    ):
        with pytest.raises(InputError, match=message):
            read_inputs(tmp_path / name, spec_of("plain"))
