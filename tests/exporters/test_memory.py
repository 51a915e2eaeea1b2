"""Models that do not fit the memory of a machine are refused before they are lowered."""

from pathlib import Path

import pytest

from diffdeploy.checkpoints import read_checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.errors import UnavailableError
from diffdeploy.exporters import ExportOptions, export_bundle, memory
from diffdeploy.exporters.memory import needed_bytes
from diffdeploy.runtime.machine import free_bytes


def test_what_is_needed_follows_from_weights_and_dtype() -> None:
    model = read_model(SAMPLE)
    elements = sum(tensor.numel() for tensor in model.weights.values())
    full, half = (needed_bytes(model.config, dtype) for dtype in ("float32", "bfloat16"))
    assert full - half == 2 * elements * (4 - 2)
    assert full - 2 * elements * 4 == half - 2 * elements * 2 == 400 * 2**20


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(SAMPLE)
    needed = needed_bytes(model.config, "float32")
    monkeypatch.setattr(memory, "free_bytes", lambda _, *, swap: needed - 1)
    with pytest.raises(UnavailableError, match=r"needs at least 0\.39\d GiB of memory, but 0\.39\d GiB are free here"):
        export_bundle(model, tmp_path / "out", ExportOptions(graph="model"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(memory, "free_bytes", lambda _, *, swap: needed)
    memory.require_memory(model.config, "float32")
    # A block is small, and a system that says nothing is tried.
    monkeypatch.setattr(memory, "free_bytes", lambda _, *, swap: 0)
    memory.require_memory(read_checkpoint(SAMPLE, layer=0).config, "float32")

    def unknown(_: str, *, swap: bool) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(memory, "free_bytes", unknown)
    memory.require_memory(model.config, "float32")


def test_memory_of_this_machine() -> None:
    assert 2**20 < free_bytes("cpu") <= free_bytes("cpu", swap=True) < 2**50


@pytest.mark.parametrize(("limit", "expected"), [("max", 8), ("4294967296", 3)], ids=["machine", "control group"])
def test_files_that_were_read_are_free(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {6 * gib // 1024} kB\nSwapFree: {2 * gib // 1024} kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{4 * gib - 1}\n")
    (group / "memory.stat").write_text(f"anon 1\nactive_file {gib}\ninactive_file {2 * gib - 1}\n")
    monkeypatch.setattr("diffdeploy.runtime.machine.Path", lambda path: tmp_path / path.lstrip("/"))
    assert free_bytes("cpu", swap=True) // gib == expected
