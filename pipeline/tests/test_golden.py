"""The reference files against PyTorch asked in another way, and their bytes."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import VOCABULARY
from device_tests.artifact import Interface
from device_tests.check import CheckOptions
from device_tests.devices.local import Run, run_local
from device_tests.gates import Gates, judge
from device_tests.quality import evaluate
from device_tests.replay import replay
from device_tests.vectors import open_evaluation, open_golden
from exporters import onnx_export
from exporters.settings import OnnxSettings
from models.checkpoint import load_model, save_model
from pipeline.golden import GOLDEN_BYTES, make_plan, run
from pipeline.quality import likeliest
from pipeline.settings import GoldenSettings

WINDOW, PROMPT = 40, 16
SETTINGS = GoldenSettings(windows=2, scored_tokens=12, greedy_tokens=10, top_k=32)
INTERFACE = Interface(VOCABULARY, 2, 2, 16, 128, None, 0, 0)


class TorchSession:
    """PyTorch with its own cache behind the interface of a device session."""

    interface = INTERFACE

    def __init__(self, model) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        self.position, self._cache = 0, None

    @torch.inference_mode()
    def prefill(self, tokens) -> np.ndarray:
        answer = self._model(torch.tensor([[int(token) for token in tokens]]), past_key_values=self._cache, use_cache=True)
        self._cache = answer.past_key_values
        self.position += len(tokens)
        return answer.logits[0, -1].numpy()

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])


def write_text(folder: Path) -> Path:
    folder.mkdir()
    windows = np.random.default_rng(0).integers(1, VOCABULARY, size=(5, WINDOW), dtype=np.int32)
    np.save(folder / "calibration.npy", windows)
    np.save(folder / "evaluation.npy", windows)
    (folder / "text.json").write_text(json.dumps({"prompt_tokens": PROMPT, "evaluation": {"kind": "random"}}))
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def stage(request, checkpoints, tmp_path_factory) -> dict[str, Path]:
    """A dense model, a damaged one in the pruned one's place, and what the stage makes of them."""
    root = tmp_path_factory.mktemp("stage")
    model = load_model(checkpoints[request.param])
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith(("down_proj.weight", "mlp.c_proj.weight")):
            weight.mul_(torch.rand(weight.shape, generator=generator) > 0.5)
    save_model(model, root / "recover", checkpoints[request.param])
    inputs = {"checkpoint": checkpoints[request.param], "recover": root / "recover", "exported": root / "recover"}
    inputs["text"] = write_text(root / "text")
    (root / "out").mkdir()
    run(SETTINGS, root / "out", **inputs)
    return {**inputs, "out": root / "out"}


def test_the_files_hold_what_pytorch_answers(stage):
    golden, evaluation = (dict(np.load(stage["out"] / f"{name}.npz")) for name in ("golden", "evaluation"))
    model, dense = load_model(stage["exported"]), load_model(stage["checkpoint"])
    with torch.no_grad():
        logits = model(torch.from_numpy(evaluation["windows"]).long()).logits
        dense_logits = dense(torch.from_numpy(evaluation["windows"]).long()).logits
    expected = torch.log_softmax(logits[:, PROMPT - 1 : -1].double(), -1)
    np.testing.assert_allclose(golden["logits"], logits[:2, PROMPT - 1 : PROMPT - 1 + 12], atol=1e-5)
    top, ids = expected.topk(32)
    np.testing.assert_allclose(evaluation["top_logprob"], top, atol=1e-5)
    assert (evaluation["top_ids"] == ids.numpy()).mean() > 0.999
    np.testing.assert_allclose(np.exp(evaluation["top_logprob"]).sum(-1) + np.exp(evaluation["rest_logprob"]), 1, atol=1e-5)
    targets = torch.from_numpy(evaluation["windows"][:, PROMPT:]).long()[..., None]
    np.testing.assert_allclose(evaluation["target_logprob"], expected.gather(-1, targets)[..., 0], atol=1e-5)
    dense_expected = torch.log_softmax(dense_logits[:, PROMPT - 1 : -1].double(), -1).gather(-1, targets)[..., 0]
    np.testing.assert_allclose(evaluation["dense_target_logprob"], dense_expected, atol=1e-5)
    assert [golden[name].dtype for name in ("windows", "logits", "greedy_tokens")] == [np.int32, np.float32, np.int32]
    prompt = torch.from_numpy(golden["greedy_prompts"]).long()
    generated = model.generate(prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(golden["greedy_tokens"], generated[:, prompt.shape[1] :])


def test_the_json_says_what_the_models_score(stage):
    record = json.loads((stage["out"] / "golden.json").read_text())
    windows = torch.from_numpy(np.load(stage["text"] / "evaluation.npy")).long()
    perplexities, distributions = {}, {}
    for name, folder in (("reference", "checkpoint"), ("pruned", "recover")):
        with torch.no_grad():
            logprob = torch.log_softmax(load_model(stage[folder])(windows).logits[:, PROMPT - 1 : -1].double(), -1)
        distributions[name] = logprob
        perplexities[name] = float(torch.exp(-logprob.gather(-1, windows[:, PROMPT:, None]).mean()))
        assert record[name]["perplexity"] == pytest.approx(perplexities[name], rel=1e-5)
        assert record[name]["tokens"] == 5 * (WINDOW - PROMPT) and record[name]["perplexity_stderr"] > 0
    p, q = distributions["reference"], distributions["pruned"]
    assert record["pruned"]["perplexity_change"] == pytest.approx(perplexities["pruned"] / perplexities["reference"] - 1, abs=1e-5)
    assert record["pruned"]["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    full = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < record["pruned"]["kl"] <= full * (1 + 1e-6)
    assert 0 < record["pruned"]["sparsity"] < 0.5 and record["reference"]["sparsity"] == 0
    assert record["exported"]["max_abs_diff_to_pruned"] == 0
    for name in ("dense", "noise"):
        cost = record["top_k"][name]
        assert 0 <= cost["lost"] < cost["kl_full"] and cost["kl_grouped"] == pytest.approx(cost["kl_full"] - cost["lost"])
    assert record["golden"]["less_than_asked"] is False and record["golden"]["greedy_tokens"] == 10


def test_pytorch_itself_passes_the_device_test(stage):
    """Cached steps of the exported model against files that were computed without a cache."""
    session = TorchSession(load_model(stage["exported"]))
    replayed = replay(session, open_golden(stage["out"], INTERFACE))
    quality = evaluate(session, open_evaluation(stage["out"], INTERFACE))
    assert replayed.max_abs_diff < 2e-5 and replayed.top1 == 1.0 and replayed.greedy_prefix == 10
    assert abs(quality.perplexity_change.value) < 1e-5 and quality.kl.value < 1e-6
    record = json.loads((stage["out"] / "golden.json").read_text())
    assert quality.perplexity.value == pytest.approx(record["exported"]["perplexity"], rel=1e-5)
    assert quality.perplexity_change_dense.value == pytest.approx(record["exported"]["perplexity_change"], abs=1e-5)
    assert judge(CheckOptions("onnxruntime").gates, replayed, quality) == []


def test_the_onnx_export_passes_in_its_own_runtime(stage, tmp_path):
    """The road from PyTorch through a file and another runtime back to the same numbers."""
    onnx_export.run(OnnxSettings(), tmp_path, model=stage["exported"], text=stage["text"])
    gates = Gates(perplexity_change=1e-4, top1=1.0, kl=1e-5, max_abs_diff=5e-5)
    local = Run("onnxruntime", gates=gates, quality=True, decode_tokens=64)
    result = run_local(tmp_path / "onnx_fp32.json", stage["out"], local)
    assert result["device"]["passed"], result["device"]["failures"]
    assert result["device"]["greedy_prefix"] == 10 and len(result["device"]["decode_ms"]) == 64


def test_the_same_inputs_give_the_same_bytes(stage, tmp_path):
    time.sleep(2.1)  # a zip's clock ticks every two seconds
    run(SETTINGS, tmp_path, **{name: folder for name, folder in stage.items() if name != "out"})
    for name in ("golden.npz", "evaluation.npz", "golden.json"):
        assert (tmp_path / name).read_bytes() == (stage["out"] / name).read_bytes()


@given(st.integers(8, 300_000), st.integers(1, 20), st.integers(1, 200), st.integers(1, 60))
def test_golden_vectors_stay_small(vocab_size, windows, scored_tokens, available):
    settings = GoldenSettings(windows=windows, scored_tokens=scored_tokens)
    plan = make_plan(settings, np.zeros((5, 16 + available), dtype=np.int32), 16, vocab_size)
    assert 1 <= plan.golden_windows <= min(windows, 5) and 1 <= plan.golden_tokens <= min(scored_tokens, available)
    assert plan.golden_windows * plan.golden_tokens * vocab_size * 4 <= max(GOLDEN_BYTES, 8 * vocab_size)
    if windows * scored_tokens * vocab_size * 4 <= GOLDEN_BYTES:
        assert (plan.golden_windows, plan.golden_tokens) == (min(windows, 5), min(scored_tokens, available))
    assert plan.top_k == min(settings.top_k, vocab_size)


@given(arrays(np.float64, 40, elements=st.sampled_from([-9.0, -3.0, -2.5, -1.0])), st.integers(1, 40))
def test_likeliest_ids_are_in_order_and_start_at_argmax(logprob, count):
    ids = likeliest(logprob, count)
    assert len(set(ids.tolist())) == count and ids[0] == logprob.argmax()
    np.testing.assert_array_equal(logprob[ids], np.sort(logprob)[::-1][:count])
