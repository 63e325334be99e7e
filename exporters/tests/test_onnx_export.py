"""The fp32 ONNX export against PyTorch, on tiny random decoders of every family."""

import json

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import CONTEXT, VOCABULARY, tiny_model
from exporters.artifact import checkpoint_sha256, sha256_of
from exporters.fusion_proof import find_fusions
from exporters.onnx_export import export, run, save
from exporters.onnx_session import empty_past, open_session, run_tokens, shared_buffer_logits
from exporters.settings import OnnxSettings
from models.checkpoint import load_model, shape_of
from models.errors import GateError

TOLERANCE = 5e-5
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def unsettle(model: torch.nn.Module) -> torch.nn.Module:
    """Random biases and norm weights: fresh models have 0 and 1 there, which hides a bias dropped or a norm's weight lost."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=draws) * 0.3
    return model.eval().requires_grad_(False)


def write(folder, model: torch.nn.Module):
    unsettle(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stages(text, tmp_path_factory):
    """The stage run once per family, and for two of them untied too: ``(checkpoint, out)`` by family and tied."""
    made = {}
    for family, tied in [(family, True) for family in FAMILIES] + [("llama", False), ("gpt2", False)]:
        folder = tmp_path_factory.mktemp(f"{family}-{tied}")
        checkpoint, out = write(folder / "model", tiny_model(family, tied=tied)), folder / "out"
        out.mkdir()
        run(OnnxSettings(greedy_tokens=12), out, model=checkpoint, text=text)
        made[family, tied] = checkpoint, out
    return made


CASES = [(family, True) for family in FAMILIES] + [("llama", False), ("gpt2", False)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stage_proves_itself_and_its_sidecar_is_true(case, stages):
    """The stage's own proof covers prefill, decode, chunks, padding and greedy text; here is what it leaves behind."""
    checkpoint, out = stages[case]
    sidecar = json.loads((out / "onnx_fp32.json").read_text())
    assert sidecar["sha256"] == sha256_of(out / sidecar["file"])
    assert sidecar["bytes"] == (out / sidecar["file"]).stat().st_size
    assert sidecar["parent"] == checkpoint_sha256(checkpoint)
    assert sidecar["measured"]["max_abs_diff"] <= TOLERANCE
    phases = {difference["phase"] for difference in sidecar["measured"]["parity"]}
    assert phases == {"prefill", "decode", "chunk", "padded_prefill", "padded_decode"}
    graph = onnx.load(out / sidecar["file"]).graph
    assert [value["name"] for value in sidecar["tensors"]["inputs"]] == [value.name for value in graph.input]
    logits = {"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", VOCABULARY]}
    assert sidecar["tensors"]["outputs"][0] == logits
    genai = json.loads((out / "genai_config.json").read_text())["model"]
    assert genai["decoder"]["inputs"]["past_key_names"] % 1 == graph.input[4].name
    assert genai["decoder"]["num_key_value_heads"] == sidecar["interface"]["kv_heads"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_written_graph_is_right_beyond_the_stage_s_own_proof(case, stages):
    """Independent of the stage's comparison: a ragged batch of two, then a decode step of both, against each row alone."""
    checkpoint, out = stages[case]
    model, session = load_model(checkpoint), open_session(out / "onnx_fp32.onnx")
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, (2, 10))
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    logits, past = run_tokens(session, tokens[:, :9], empty_past(session, 2), mask)
    step, _ = run_tokens(session, tokens[[0, 1], [9, 6]][:, None], past, np.concatenate([mask, [[1], [1]]], axis=1))
    for row, length in ((0, 9), (1, 6)):
        expected = model(torch.from_numpy(tokens[row : row + 1, : length + 1])).logits[0].numpy()
        np.testing.assert_allclose(logits[row, :length], expected[:-1], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(step[row, 0], expected[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_fusions_are_used(family, stages):
    measured = json.loads((stages[family, True][1] / "onnx_fp32.json").read_text())["measured"]
    kinds = measured["operators"]
    assert kinds["GroupQueryAttention"] == 2
    assert measured["rotary_inside_attention"] == (family != "gpt2")
    assert measured["qkv_packed"] == 2
    assert kinds.get("Split", 0) == (2 if family == "qwen3" else 0)  # which norms q and k in between
    assert measured["not_fused"] == []
    assert measured["skip_norms"] >= 4
    assert "Softmax" not in kinds and "Expand" not in kinds  # no attention and no mask in plain operators


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_tied_table_is_stored_once(family, stages):
    sizes = [(stages[family, tied][1] / "onnx_fp32.onnx").stat().st_size for tied in (True, False)]
    table = VOCABULARY * 64 * 4
    assert abs(sizes[1] - sizes[0] - table) < 1000


def odd_llama(**changes) -> torch.nn.Module:
    """Three layers, an FFN of 88 and six heads in three groups: what pruning leaves."""
    torch.manual_seed(2)
    config = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    config |= {"intermediate_size": 88, "vocab_size": 301, "max_position_embeddings": 64, "initializer_range": 0.15}
    return unsettle(LlamaForCausalLM(LlamaConfig(**config | changes)))


@pytest.mark.parametrize("head_dim", (8, 16, 40))
def test_odd_shapes_with_rotation_inside_or_before_the_operator(head_dim, tmp_path):
    model = odd_llama(head_dim=head_dim)
    assert find_fusions(model, shape_of(model)).rotate_inside == (head_dim % 16 == 0)
    session = open_session(save(export(model, shape_of(model)).graph, tmp_path / "model.onnx")[0])
    tokens = np.random.default_rng(1).integers(0, 301, (1, 20))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    prompt, past = run_tokens(session, tokens[:, :13], empty_past(session, 1))
    chunk, _ = run_tokens(session, tokens[:, 13:], past)
    np.testing.assert_allclose(np.concatenate([prompt, chunk], axis=1), expected, atol=TOLERANCE, rtol=0)


def test_a_head_size_that_the_operator_lacks_is_padded_in_the_cache_and_told(text, tmp_path):
    """Four numbers behind each head of 12: the host sees a cache of 16, in the sidecar as in the graph."""
    checkpoint, out = tmp_path / "model", tmp_path / "out"
    odd_llama(head_dim=12, vocab_size=VOCABULARY).save_pretrained(checkpoint)
    out.mkdir()
    run(OnnxSettings(greedy_tokens=12), out, model=checkpoint, text=text)
    sidecar = json.loads((out / "onnx_fp32.json").read_text())
    assert sidecar["interface"]["head_dim"] == 16 == sidecar["tensors"]["inputs"][2]["shape"][3]
    assert json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["head_size"] == 16
    assert sidecar["measured"]["not_fused"][0].startswith("heads of 12 padded to 16")


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_one_shared_buffer_gives_the_plain_cache_numbers(family, stages):
    session = open_session(stages[family, True][1] / "onnx_fp32.onnx")
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 30)
    chunks = [tokens[:11], *tokens[11:19, None], tokens[19:]]  # a prompt, single tokens, a chunk
    plain, past = [], empty_past(session, 1)
    for chunk in chunks:
        logits, past = run_tokens(session, chunk[None], past)
        plain.append(logits[0])
    shared = list(shared_buffer_logits(session, iter(chunks), CONTEXT))
    for left, right in zip(plain, shared, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=0)


def test_a_difference_above_the_limit_is_a_failed_gate(text, tmp_path, checkpoints):
    with pytest.raises(GateError, match=r"onnx_fp32: logits differ from PyTorch by .* limit 1e-12; worst in \w+, window"):
        run(OnnxSettings(max_abs_diff=1e-12), tmp_path, model=checkpoints["llama"], text=text)


def test_two_exports_are_byte_identical_and_name_no_place(text, tmp_path, stages):
    checkpoint, first = stages["qwen2", True]
    run(OnnxSettings(greedy_tokens=12), tmp_path, model=checkpoint, text=text)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["genai_config.json", "onnx_fp32.json", "onnx_fp32.onnx"]
    for name in names:
        content = (first / name).read_bytes()
        assert content == (tmp_path / name).read_bytes()
        assert b"site-packages" not in content and b".py" not in content and str(tmp_path).encode() not in content


def test_the_model_is_left_as_it_was(checkpoints):
    """The hook patches classes of transformers: afterwards the same model must answer the same."""
    model = load_model(checkpoints["llama"])
    tokens = torch.arange(9)[None]
    before = model(tokens).logits
    export(model, shape_of(model))
    assert torch.equal(model(tokens).logits, before)
    fresh = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    assert torch.allclose(fresh(tokens).logits, before, atol=1e-6)


def test_weights_above_the_limit_go_to_a_second_file_that_onnx_runtime_opens(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("exporters.onnx_export.EXTERNAL_DATA_BYTES", 100_000)
    model = load_model(checkpoints["llama"])
    files = save(export(model, shape_of(model)).graph, tmp_path / "model.onnx")
    assert [path.name for path in files] == ["model.onnx", "model.onnx.data"]
    tokens = np.arange(9)[None]
    session = open_session(files[0])
    logits, _ = run_tokens(session, tokens, empty_past(session, 1))
    np.testing.assert_allclose(logits, model(torch.from_numpy(tokens)).logits.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_read_per_token_are_all_weights_but_tables(case, stages):
    """Of an embedding that is no head, and of GPT-2's positions, a token reads a row; of everything else all of it."""
    checkpoint, out = stages[case]
    model = load_model(checkpoint)
    tables = {"wpe"} if case[1] else {"wpe", "wte", "embed_tokens"}
    read = sum(weight.numel() for name, weight in model.named_parameters() if not tables & set(name.split(".")))
    told = json.loads((out / "onnx_fp32.json").read_text())["bytes_read_per_token"]
    assert read * 4 <= told <= read * 4 + 400  # shapes and axes of the graph
