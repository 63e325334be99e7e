"""The whole command over the toy in ONNX Runtime and tiny checkpoints in PyTorch; what cannot be compared is told in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from device_tests.tests.toy import INTERFACE, VOCABULARY, ToyModel, write_onnx, write_vectors
from exporters.artifact import checkpoint_sha256
from models.checkpoint import load_model, save_model
from models.errors import UserError
from pipeline import golden as golden_stage
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.quality_command import QualityOptions, quality
from pipeline.quality_reference import PROVED, SAME_VECTORS, UNPROVED, belongs, read_reference
from pipeline.quality_table import POSITION_COLUMNS, QUALITY_COLUMNS, caption, position_rows, quality_rows, worst_text
from pipeline.report import build_report
from pipeline.settings import GoldenSettings
from pipeline.tests.fake_road import EVERYTHING, fake_outcome, fake_recipe, fake_road, fake_stages, with_toy
from pipeline.tests.test_cli import refused
from pipeline.tests.test_golden import write_text

TOP_K = {"k": 6, "rest_probability": 0.125, "noise": {"kl_full": 0.008, "kl_grouped": 0.006, "lost": 0.002}}


def quiet(label: str, state: str) -> None:
    """Nobody looks on."""


def write_golden_json(folder: Path, vocab_size: int = VOCABULARY) -> None:
    """The toy's golden.json: its sizes and what the command shows of it."""
    shape = {"vocab_size": vocab_size, "layers": 2, "kv_heads": 1, "head_dim": 8, "context_tokens": INTERFACE.context_tokens}
    exported = {"perplexity": 51.5, "perplexity_stderr": 2.5, "shape": shape}
    record = {"reference": {"perplexity": 50.0}, "exported": exported, "top_k": TOP_K}
    (folder / "golden.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, Path]:
    """Golden files of toy 0, and toys 0 and 1 as artifacts."""
    root = tmp_path_factory.mktemp("toy")
    (root / "reference").mkdir()
    write_vectors(root / "reference", ToyModel(0), ToyModel(1))
    write_golden_json(root / "reference")
    found = {"golden": root / "reference"}
    for seed in (0, 1):
        (root / str(seed)).mkdir()
        found[f"toy{seed}"] = write_onnx(ToyModel(seed), root / str(seed) / f"toy{seed}.onnx")
    return found


@pytest.fixture(scope="module")
def scored(toy) -> dict:
    return quality([toy["toy0"], toy["toy1"]], toy["golden"], QualityOptions(worst=2), quiet)


def test_the_reference_s_own_artifact_changes_nothing(scored):
    same = scored["results"][0]
    assert (same["artifact"], same["runtime"], same["failures"], same["belongs"]) == ("toy0", "onnxruntime", [], UNPROVED)
    found = same["quality"]
    assert found["tokens"] == 39 and found["top1"] == found["top5"] == 1.0
    for name in ("perplexity_change", "kl", "kl_tail", "kl_max", "delta_p", "delta_p_rms"):
        assert found[name] == pytest.approx(0, abs=1e-5), name


def test_another_model_has_the_numbers_of_the_full_distributions(toy, scored):
    windows = np.load(toy["golden"] / "evaluation.npz")["windows"]
    losses = {seed: [] for seed in (0, 1)}
    for window in windows:
        for seed, own in losses.items():
            rows = torch.log_softmax(torch.from_numpy(ToyModel(seed).logits(window)[10:-1]).double(), -1).numpy()
            own.append(-rows[np.arange(13), window[11:]])
    p, q = (np.exp(-np.stack(losses[seed])) for seed in (0, 1))
    found = scored["results"][1]["quality"]
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses[1])), rel=1e-4)
    assert found["perplexity_change"] == pytest.approx(np.exp(np.mean(losses[1]) - np.mean(losses[0])) - 1, rel=1e-3)
    assert found["delta_p"] == pytest.approx((q - p).mean(), rel=1e-3)
    assert found["delta_p_rms"] == pytest.approx(np.sqrt(((q - p) ** 2).mean()), rel=1e-3)
    assert sum(bucket["tokens"] for bucket in found["positions"]) == 39 and len(found["positions"]) == 8
    assert (found["positions"][0]["first_token"], found["positions"][-1]["last_token"]) == (11, 23)


def test_the_shortcut_s_error_is_told(scored):
    reference = scored["reference"]
    assert reference["top_k"]["share_lost"] == {"noise": pytest.approx(0.25)}
    assert (reference["windows"], reference["tokens"], reference["dense_perplexity"]) == (3, 39, 50.0)
    assert "misses 25.0% of the KL" in caption(scored) and "12.5% of the probability" in caption(scored)
    json.dumps(scored, allow_nan=False)


def test_every_result_is_a_row_and_every_bucket(scored):
    rows, places = quality_rows(scored), position_rows(scored)
    assert [row[:2] for row in rows] == [("toy0", "onnxruntime"), ("toy1", "onnxruntime")]
    assert all(len(row) == len(QUALITY_COLUMNS) for row in rows) and all(len(row) == len(POSITION_COLUMNS) for row in places)
    assert len(places) == 16 and places[0][2] == "11-12"
    assert "100.00%" in rows[0] and f"{scored['results'][1]['quality']['kl']:.3g}" in rows[1]


def test_worst_windows_come_as_text_where_a_tokenizer_is(toy, tmp_path):
    letters = with_toy(fake_road(tmp_path / "road"))["tokenizer"] / "tokenizer.json"
    found = quality([toy["toy1"]], toy["golden"], QualityOptions(worst=3, tokenizer=letters), quiet)["results"][0]
    windows = np.load(toy["golden"] / "evaluation.npz")["windows"]
    alphabet = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:()=\u00e9"[:VOCABULARY]
    worst = found["quality"]["worst_windows"]
    assert [own["statistics"]["kl"] for own in worst] == sorted((own["statistics"]["kl"] for own in worst), reverse=True)
    assert sorted(own["window"] for own in worst) == [0, 1, 2]
    for own in worst:
        ids, place = windows[own["window"]], own["worst_token"]
        if max(ids) < len(alphabet):  # the toy has more ids than letters
            text = "".join(alphabet[token] for token in ids)
            assert (own["before"], own["token"], own["after"]) == (text[:place], text[place], text[place + 1 :])
        assert own["ids"] == ids.tolist()
    lines = worst_text(found)
    assert len(lines) == 6 and all("\n" not in line for line in lines) and "»" in lines[1]
    without = quality([toy["toy1"]], toy["golden"], QualityOptions(worst=1), quiet)["results"][0]
    assert without["quality"]["worst_windows"][0]["token"] is None and "give --tokenizer" in worst_text(without)[1]


def test_an_artifact_that_dies_is_a_failed_row_and_the_next_is_scored(toy, tmp_path):
    """A sidecar whose sizes are not the graph's: the runtime is refused by name, the other artifact has its numbers."""
    for path in toy["toy1"].parent.iterdir():
        shutil.copy(path, tmp_path / path.name)
    record = json.loads((tmp_path / "toy1.json").read_text())
    record["interface"]["layers"] = 3
    (tmp_path / "toy1.json").write_text(json.dumps(record))
    found = quality([tmp_path / "toy1.json", toy["toy0"]], toy["golden"], QualityOptions(), quiet)
    broken, sound = found["results"]
    assert broken["quality"] is None and "inputs differ from the contract" in broken["failures"][0]
    assert sound["quality"]["top1"] == 1.0
    assert [row[-1] for row in quality_rows(found)] == ["FAILED", "scored"] and worst_text(broken) == []


def test_a_sidecar_s_runtimes_are_its_own_unless_one_is_asked_for(toy, tmp_path):
    for path in toy["toy0"].parent.iterdir():
        shutil.copy(path, tmp_path / path.name)
    record = json.loads((tmp_path / "toy0.json").read_text())
    (tmp_path / "toy0.json").write_text(json.dumps({**record, "runtimes": []}))
    with pytest.raises(UserError, match="proved right in no runtime"):
        quality([tmp_path / "toy0.json"], toy["golden"], QualityOptions(), quiet)
    asked = quality([tmp_path / "toy0.json"], toy["golden"], QualityOptions(runtime="onnxruntime"), quiet)
    assert [result["runtime"] for result in asked["results"]] == ["onnxruntime"]
    with pytest.raises(UserError, match="nothing in it for --runtime litert; give one of onnxruntime"):
        quality([tmp_path / "toy0.json"], toy["golden"], QualityOptions(runtime="litert"), quiet)


def test_a_bundle_is_all_its_artifacts(toy, tmp_path):
    road = with_toy(fake_road(tmp_path / "road"))
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    bundle = build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), tmp_path / "dist")
    found = quality([bundle.folder], toy["golden"], QualityOptions(runtime="onnxruntime"), quiet)["results"]
    assert [(result["artifact"], result["belongs"]) for result in found] == [
        ("onnx_fp32", SAME_VECTORS),
        ("onnx_static_int8", SAME_VECTORS),
    ]
    assert all(result["quality"]["top1"] == 1.0 for result in found)
    assert found[0]["quality"]["worst_windows"][0]["token"] is not None  # the bundle's own tokenizer
    with pytest.raises(UserError, match="no evaluation.npz in it; a bundle has none"):
        quality([bundle.folder], bundle.folder / "golden", QualityOptions(), quiet)


@pytest.fixture(scope="module")
def checkpoint_golden(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """A golden stage over the tiny Llama, and the same Llama with half of its FFN's outputs removed."""
    root = tmp_path_factory.mktemp("golden")
    model = load_model(checkpoints["llama"])
    for name, weight in model.named_parameters():
        if name.endswith("down_proj.weight"):
            weight[::2] = 0
    save_model(model, root / "damaged", checkpoints["llama"])
    inputs = {"checkpoint": root / "damaged", "recover": checkpoints["llama"], "exported": checkpoints["llama"]}
    (root / "out").mkdir()
    settings = GoldenSettings(windows=2, scored_tokens=8, greedy_tokens=4, top_k=384)
    golden_stage.run(settings, root / "out", **inputs, text=write_text(root / "text"))
    return {"golden": root / "out", "damaged": root / "damaged", "same": checkpoints["llama"]}


def test_a_hugging_face_folder_is_scored_in_pytorch(checkpoint_golden):
    given = [checkpoint_golden["same"], checkpoint_golden["damaged"]]
    found = quality(given, checkpoint_golden["golden"], QualityOptions(worst=1), quiet)["results"]
    same, damaged = (result["quality"] for result in found)
    assert [result["runtime"] for result in found] == ["pytorch", "pytorch"]
    assert same["top1"] == 1.0 and same["kl_max"] == pytest.approx(0, abs=1e-5)
    windows = torch.from_numpy(np.load(checkpoint_golden["golden"] / "evaluation.npz")["windows"]).long()
    with torch.no_grad():
        p, q = (torch.log_softmax(load_model(folder)(windows).logits[:, 15:-1].double(), -1) for folder in given)
    targets = windows[:, 16:, None]
    assert damaged["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)  # all 384 tokens are kept
    change = (q.gather(-1, targets).exp() - p.gather(-1, targets).exp()).numpy()
    assert damaged["delta_p_rms"] == pytest.approx(np.sqrt((change**2).mean()), rel=1e-3)
    firsts = p.argmax(-1, keepdim=True)
    assert damaged["top5"] == pytest.approx(float((q.topk(5).indices == firsts).any(-1).double().mean()), abs=1e-9)
    assert damaged["perplexity_change_dense"] == pytest.approx(0, abs=1e-5)


def test_a_model_of_another_vocabulary_is_told_in_one_line(toy, checkpoints):
    with pytest.raises(UserError, match="48 logits, the artifact has 384.*made for another model"):
        quality([checkpoints["gpt2"]], toy["golden"], QualityOptions(), quiet)


def write_stage(work: Path, stage: str, key: str, inputs: dict[str, str]) -> Path:
    """A stage result's folder with the runner's note."""
    folder = work / stage / key
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"stage": stage, "key": key, "parts": {"inputs": inputs}}))
    return folder


def test_the_chain_of_parents_proves_where_an_artifact_comes_from(toy, checkpoints, tmp_path):
    """int8 was made from fp32, and that from the checkpoint that the golden stage scored; another checkpoint is refused."""
    work = tmp_path / "work"
    for key, family in (("aa", "llama"), ("bb", "gpt2")):
        shutil.copytree(checkpoints[family], write_stage(work, "cluster", key, {}), dirs_exist_ok=True)
    golden = write_stage(work, "golden", "aa", {"exported": "aa", "checkpoint": "aa"})
    shutil.copytree(toy["golden"], golden, dirs_exist_ok=True)
    for key in ("aa", "bb"):
        fp32, int8 = write_stage(work, "onnx", key, {"model": key}), write_stage(work, "onnx_int8", key, {"onnx": key, "text": "aa"})
        source = checkpoint_sha256(work / "cluster" / key)
        for folder, name, parent in ((fp32, "onnx_fp32", source), (int8, "onnx_static_int8", f"sha of fp32 {key}")):
            record = {"name": name, "sha256": f"sha of {name.split('_')[-1]} {key}", "parent": parent}
            (folder / f"{name}.json").write_text(json.dumps(record))
    reference = read_reference(golden)
    assert reference.tokenizer is None  # the checkpoint stage's result is not there
    assert belongs(work / "onnx/aa/onnx_fp32.json", reference) == PROVED
    assert belongs(work / "onnx_int8/aa/onnx_static_int8.json", reference) == PROVED
    for other in (work / "onnx/bb/onnx_fp32.json", work / "onnx_int8/bb/onnx_static_int8.json"):
        with pytest.raises(UserError, match="exported from another model"):
            belongs(other, reference)
    shutil.rmtree(work / "onnx/bb")
    assert belongs(work / "onnx_int8/bb/onnx_static_int8.json", reference) == UNPROVED  # its parent is gone


def test_mistakes_are_one_line(toy, tmp_path, checkpoints):
    golden, sidecar = str(toy["golden"]), str(toy["toy0"])
    assert "run `pocketlm run`" in refused(tmp_path, "quality", sidecar, "--model", str(checkpoints["llama"]))
    assert "leave out" in refused(tmp_path, "quality", sidecar, "--golden", golden, "--model", "x")
    assert "no golden.json" in refused(tmp_path, "quality", sidecar, "--golden", str(tmp_path))
    assert "nothing to score there" in refused(tmp_path, "quality", "none.json", "--golden", golden)
    assert "no such runtime" in refused(tmp_path, "quality", sidecar, "--golden", golden, "--runtime", "onnx")
    assert "--worst -1" in refused(tmp_path, "quality", sidecar, "--golden", golden, "--worst=-1")
    assert "--threads 0" in refused(tmp_path, "quality", sidecar, "--golden", golden, "--threads", "0")
    assert "no such file" in refused(tmp_path, "quality", sidecar, "--golden", golden, "--tokenizer", "none.json")
    (tmp_path / "list.json").write_text("[1]")
    assert "no JSON object" in refused(tmp_path, "quality", "list.json", "--golden", golden)
    (tmp_path / "half.json").write_text("{}")
    assert "no sidecar" in refused(tmp_path, "quality", "half.json", "--golden", golden)
    (tmp_path / "broken.json").write_text("{")
    assert "no tokenizer that can be read" in refused(tmp_path, "quality", sidecar, "--golden", golden, "--tokenizer", "broken.json")
