"""``inspect --draw``: the graph around the attention of one layer."""

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from diffdeploy.checkpoints import Checkpoint
from diffdeploy.cli.drawing import draw
from diffdeploy.cli.main import main
from diffdeploy.formats import ExportOptions, GraphNode
from tests.support.bundles import BundleCache, FormatBundle
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

SVG = "{http://www.w3.org/2000/svg}"


def boxes_of(data: bytes) -> list[tuple[str, str]]:
    """Kind and full text of every box."""
    root = ElementTree.fromstring(data)
    assert root.tag == f"{SVG}svg"
    return [(group.get("class") or "", group.findtext(f"{SVG}title") or "") for group in root.iter(f"{SVG}g")]


def test_chains_that_only_move_numbers_share_a_box() -> None:
    nodes = [
        GraphNode("MatMul", "projection", ("x",), ("q",), ("block.q_proj.weight",)),
        GraphNode("Shape", "sizes", ("x",), ("s",)),
        GraphNode("Reshape", "layout", ("q", "s"), ("r",)),
        GraphNode("Transpose", "layout", ("r",), ("t",)),
        GraphNode("Attention", "attention", ("t", "t", "t"), ("a",)),
        GraphNode("Attention", "attention", ("t", "t", "t"), ("b",)),
        GraphNode("Sub", "other", ("a", "b"), ("y",)),
        GraphNode("MatMul", "projection", ("y",), ("o",), ("block.out_proj.weight",)),
        GraphNode("Next", "other", ("o",), ("n",)),
        GraphNode("Elsewhere", "other", ("x",), ("z",)),
    ]
    data = draw(nodes, range(2), "title")
    assert boxes_of(data) == [
        ("value", "x"),
        ("projection", "MatMul; q_proj.weight"),
        ("layout", "Reshape · Transpose"),
        ("attention", "Attention"),
        ("attention", "Attention"),
        ("other", "Sub"),
        ("projection", "MatMul; out_proj.weight"),
    ]
    # x to MatMul, MatMul to the chain, the chain three times to each attention, each of which goes to Sub, and on.
    assert len(list(ElementTree.fromstring(data).iter(f"{SVG}path"))) == 1 + 1 + 6 + 2 + 1
    # Of one attention alone; the other is not passed.
    assert Counter(kind for kind, _ in boxes_of(draw(nodes, range(1), "title")))["attention"] == 1


@pytest.mark.parametrize(("name", "product"), [("onnx", "MatMul"), ("pt2", "linear")], ids=["onnx", "pt2"])
def test_a_block_from_its_input_to_its_output(name: str, product: str, format_bundle: FormatBundle) -> None:
    assert main(["inspect", str(format_bundle(name)), "--draw", "out.svg"]) == 0
    data = Path("out.svg").read_bytes()
    boxes = boxes_of(data)
    kinds = Counter(kind for kind, _ in boxes)
    assert (kinds["attention"], kinds["value"]) == (2, 1)
    assert "sizes" not in kinds
    # Queries, keys, values and outputs; lambda on its way to the difference.
    assert [said.split(";")[0] for kind, said in boxes if kind == "projection"] == [product] * 4
    assert any("_frozen_lambda" in said for _, said in boxes)
    assert b"<script" not in data
    assert main(["inspect", str(format_bundle(name)), "--draw", "again.svg"]) == 0
    assert Path("again.svg").read_bytes() == data


@pytest.mark.slow
def test_one_layer_of_a_model(model_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layer in (0, 2):
        assert main(["inspect", str(model_bundle), "--draw", "out.svg", "--layer", str(layer)]) == 0
        said = " ".join(text for _, text in boxes_of(Path("out.svg").read_bytes()))
        assert f"layers.{layer}.self_attn._frozen_lambda" in said
        # Between its own projections, whose weights are those of no other layer.
        assert not [other for other in range(4) if other != layer and f"layers.{other}." in said]
        assert said.count("_frozen_lambda") == 1
    capsys.readouterr()
    message = refused(["inspect", str(model_bundle), "--draw", "x.svg", "--layer", "4"], capsys)
    assert "--layer is 4; the graph has 4 layers, counted from 0" in message


@pytest.fixture(scope="module")
def model_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("model") / "bundle"
    arguments = ["--max-batch-size", "2", "--max-sequence-length", "16", "--no-verify", "--quiet"]
    assert main(["export", *arguments, "-o", str(output)]) == 0
    return output


def test_what_cannot_be_drawn_is_refused(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffdeploy.checkpoints.files import SAMPLE

    arguments = ["--layer", "0", "--format", "flash2", "--dtype", "float16", "--no-verify", "-q", "-o", "flash2"]
    assert main(["export", *arguments]) == 0
    capsys.readouterr()
    assert "format flash2 has no graph that can be read" in refused(["inspect", "flash2", "--draw", "x.svg"], capsys)
    assert "export it first" in refused(["inspect", str(SAMPLE), "--draw", "x.svg"], capsys)
    bundle = str(sample_bundle)
    assert "accepted: file names that end in .svg" in refused(["inspect", bundle, "--draw", "x.png"], capsys)
    assert "there is no folder nowhere" in refused(["inspect", bundle, "--draw", "nowhere/x.svg"], capsys)
    assert "give --draw, too" in refused(["inspect", bundle, "--layer", "0"], capsys)


def test_attentions_that_are_written_out(sample: Checkpoint, bundles: BundleCache) -> None:
    bundle = bundles.bundle(sample, ExportOptions(max_sequence_length=200, opset=18, graph="masked", cases="quick"))
    assert main(["inspect", str(bundle), "--draw", "out.svg"]) == 0
    assert [said for kind, said in boxes_of(Path("out.svg").read_bytes()) if kind == "attention"] == ["Softmax"] * 2
