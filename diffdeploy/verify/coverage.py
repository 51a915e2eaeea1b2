"""The parts of the declared ranges that a verification tried, and how they were compared."""

from collections.abc import Iterable, Mapping, Sequence

from diffdeploy.graphs import GraphSpec, Range
from diffdeploy.records import Record
from diffdeploy.verify.cases import AnyCase

__all__ = ["Coverage", "covered"]

# If two neighbouring sizes differ by more than this factor, the sizes in between count as untried. The sweep draws one
# size per octave, so its neighbouring sizes are closer.
_FURTHEST = 4


class Coverage(Record):
    """The part of one declared range that was tried.

    Attributes:
        axis: name of the axis.
        declared: smallest and largest size that the graph accepts.
        num_sizes: number of different sizes that were run.
        compared_whole: range of sizes whose outputs were compared completely; ``None`` if there were none.
        compared_in_part: range of sizes whose outputs were compared only at some positions, or whose rows repeat those
            of smaller batches; ``None`` if there were none.
        untried: parts of the range in which no size was run.
    """

    axis: str
    declared: Range
    num_sizes: int
    compared_whole: Range | None
    compared_in_part: Range | None
    untried: list[Range]

    @property
    def untried_text(self) -> str | None:
        """Untried sizes, such as ``sequence_length 130 to 2048``; ``None`` if there are none."""
        if not self.untried:
            return None
        parts = [str(part.min) if part.min == part.max else f"{part.min} to {part.max}" for part in self.untried]
        return f"{self.axis} {', '.join(parts)}"


def covered(spec: GraphSpec, cases: Iterable[AnyCase]) -> list[Coverage]:
    """Compute the coverage of every range of a graph.

    Args:
        spec: interface of the graph.
        cases: cases that were run.
    """
    whole: dict[str, set[int]] = {axis: set() for axis in spec.axes}
    part: dict[str, set[int]] = {axis: set() for axis in spec.axes}
    for case in cases:
        for sizes in _calls(case):
            for axis in spec.axes.keys() & sizes.keys():
                in_part = case.queries() is not None and axis != "batch_size"
                in_part |= axis == "batch_size" and len(set(case.sources())) < len(case.sources())
                (part if in_part else whole)[axis].add(sizes[axis])
    return [_of_axis(axis, declared, whole[axis], part[axis]) for axis, declared in spec.axes.items()]


def _calls(case: AnyCase) -> list[Mapping[str, int]]:
    """Sizes of the axes in each call of a case."""
    batch, length, past = case.sizes
    chunks = (length - case.decoded, *[1] * case.decoded) if case.decoded else case.chunks
    if chunks:
        ends = [sum(chunks[:number]) for number in range(len(chunks))]
        return [_sizes(batch, chunk, end) for chunk, end in zip(chunks, ends, strict=True)]
    return [_sizes(1 if case.row_by_row else batch, length, past)]


def _sizes(batch: int, length: int, past: int) -> Mapping[str, int]:
    return {
        "batch_size": batch,
        "sequence_length": length,
        "past_sequence_length": past,
        "total_sequence_length": past + length,
    }


def _of_axis(axis: str, declared: Range, whole: set[int], part: set[int]) -> Coverage:
    sizes = sorted(whole | part)
    return Coverage(
        axis=axis,
        declared=declared,
        num_sizes=len(sizes),
        compared_whole=_ends(whole),
        compared_in_part=_ends(part),
        untried=_gaps(declared, sizes),
    )


def _ends(sizes: set[int]) -> Range | None:
    return Range(min=min(sizes), max=max(sizes)) if sizes else None


def _gaps(declared: Range, sizes: Sequence[int]) -> list[Range]:
    """Parts of the range between neighbouring sizes, and at either end."""
    gaps, before = [], declared.min - 1
    for size in (*sizes, declared.max + 1):
        is_end = before < declared.min or size > declared.max
        if size - before > 1 and (is_end or size > _FURTHEST * max(before, 1)):
            gaps.append(Range(min=before + 1, max=size - 1))
        before = size
    return gaps
