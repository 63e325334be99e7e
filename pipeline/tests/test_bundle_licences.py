"""Whose is what: licence, notice and model card of a bundle."""

import json

import pytest
from huggingface_hub import ModelCard

from pipeline.bundle import build_bundle
from pipeline.bundle_files import BundleInputs
from pipeline.recipe import ROOT
from pipeline.report import build_report
from pipeline.tests.fake_road import fake_outcome, fake_recipe, fake_road, fake_stages


@pytest.fixture
def road(tmp_path):
    return fake_road(tmp_path / "road")


def folder_of(road, tmp_path):
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key"), tmp_path / "dist").folder


def change(road, stage: str, **changes) -> None:
    path = road[stage] / f"{stage}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_notice_tells_whose_each_part_is(road, tmp_path):
    (road["checkpoint"] / "NOTICE.txt").write_text("Tiny was made by its makers.\n")
    folder = folder_of(road, tmp_path)
    text = (folder / "NOTICE").read_text()
    for told in (
        "models/tiny", "ab" * 32, "apache-2.0", "pruned from 100000 to 90000 parameters", "onnx/model.onnx", "tokenizer/tokenizer.json",
        "text.txt as whoever built the bundle gave it", "device_tests/LICENSE", "Tiny was made by its makers.",
    ):  # fmt: skip
        assert told in text, told
    assert "makers" not in (folder / "LICENSE").read_text()
    assert (folder / "device_tests/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_notice_says_when_the_model_wrote_the_text_itself(tmp_path):
    folder = folder_of(fake_road(tmp_path / "road", sampled=True), tmp_path)
    assert "The dense model wrote that text itself." in (folder / "NOTICE").read_text()


def test_model_card_is_one_of_the_hub(road, tmp_path):
    (road["checkpoint"] / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n![curve](curve.png)\nKnows little.\n")
    card = ModelCard.load(folder_of(road, tmp_path) / "MODEL_CARD.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation" and card.data.base_model is None
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 31.25, "text.txt")
    for told in (
        "0.09 M parameters",
        "| before pruning | 30.000 |",
        "| this one, fp32 in PyTorch | 31.250 | +4.00% |",
        "`onnx/model.onnx`",
    ):
        assert told in card.text, told
    assert "> # Tiny\n> Knows little." in card.text and card.text.lstrip().startswith("# tiny\n")


def test_model_card_names_the_base_model_only_where_it_is_on_the_hub(road, tmp_path):
    change(road, "checkpoint", source="org/tiny", commit="c" * 40)
    card = ModelCard.load(folder_of(road, tmp_path) / "MODEL_CARD.md")
    assert card.data.base_model == "org/tiny" and "commit `" + "c" * 40 in card.text


def test_unknown_licence_is_said_in_the_hub_s_word(road, tmp_path):
    change(road, "checkpoint", licence=None)
    (road["checkpoint"] / "LICENSE").unlink()
    folder = folder_of(road, tmp_path)
    assert ModelCard.load(folder / "MODEL_CARD.md").data.license == "unknown" and "Licence: unknown" in (folder / "NOTICE").read_text()
