"""Every family that calls its attention through transformers' interface, as one graph: numbers, greedy text, and fusions kept."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers.models.llama import modeling_llama

from exporters.fusion_proof import find_fusions, mismatch, observe
from exporters.onnx_export import check, describe, export, prove, save, tokens_beyond
from exporters.onnx_passes import attention_nodes
from exporters.rotation import Rotation, rotary_tables
from exporters.settings import OnnxSettings
from exporters.tests.families import CONTEXT, FAMILIES, VOCABULARY, WINDOW, tiny_decoder
from models.checkpoint import shape_of
from models.errors import GateError, UserError
from models.families import ONNX_FAMILIES, SUPPORTED_FAMILIES

SETTINGS = OnnxSettings(max_abs_diff=2e-5, greedy_tokens=12)
# What attention, masks and rotations in plain operators are made of: none of it may be left.
PLAIN_ATTENTION = {"Softmax", "Expand", "Trilu", "Range", "Sin", "Cos", "Neg"}


def windows_of_text(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (2, tokens)).astype(np.int32)


def exported(model: torch.nn.Module, folder, change=lambda graph: None):
    """The export and its file; ``change`` may break the graph before it is written."""
    made = export(model, shape_of(model))
    change(made.graph.graph)
    path = save(made.graph, folder / "model.onnx")[0]
    check(path)
    return made, path


def proved(model: torch.nn.Module, made, path, tokens: int = 40) -> dict:
    windows = windows_of_text(tokens)
    return prove(model, path, windows, tokens_beyond(windows, made.fusions.windows, CONTEXT), SETTINGS)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_computes_what_pytorch_does_and_keeps_its_fusions(name, tmp_path):
    family = FAMILIES[name]
    model = tiny_decoder(family.model_type or name, family.config)
    made, path = exported(model, tmp_path)
    measured = proved(model, made, path)
    phases = {difference["phase"] for difference in measured["parity"]}
    expected = {"prefill", "decode", "chunk", "padded_prefill", "padded_decode"}
    assert phases == (expected | {"beyond_window"} if any(family.windows) else expected)
    found = describe(made)
    assert made.fusions.rotation.place == family.place and made.fusions.rotation.interleaved == family.interleaved
    assert found["qkv_packed"] == family.packed and found["skip_norms"] == family.skip_norms
    assert len(found["not_fused"]) == len(family.not_fused)
    assert all(told.startswith(start) for told, start in zip(found["not_fused"], family.not_fused, strict=True))
    assert not PLAIN_ATTENTION & found["operators"].keys()
    assert "Gemm" not in found["operators"]  # quantisation takes MatMul
    attentions = [node for node in onnx.load(path).graph.node if node.op_type == "GroupQueryAttention"]
    attributes = [{part.name: onnx.helper.get_attribute_value(part) for part in node.attribute} for node in attentions]
    assert tuple(part.get("local_window_size") for part in attributes) == family.windows
    inside = sum(part.get("do_rotary", 0) for part in attributes)
    outside = found["operators"].get("RotaryEmbedding", 0)
    assert (inside, outside) == ((family.rotated, 0) if family.place == "attention" else (0, 2 * family.rotated))


def test_every_family_that_is_called_known_is_exported_here():
    tested = {family.model_type or name for name, family in FAMILIES.items()}
    assert tested == {*ONNX_FAMILIES, *SUPPORTED_FAMILIES}


@pytest.mark.parametrize("lost", ("local_window_size", "softcap"))
def test_an_attention_that_loses_a_window_or_a_cap_fails_the_proof(lost, tmp_path):
    """The calibration windows are shorter than the sliding one: only the proof beyond it can notice that it is gone."""
    model = tiny_decoder("gemma2", {**FAMILIES["gemma2"].config, "sliding_window": 20})

    def lose(graph: ir.Graph) -> None:
        for node in attention_nodes(graph):
            node.attributes.pop(lost, None)

    made, path = exported(model, tmp_path, lose)
    with pytest.raises(GateError, match="beyond_window" if lost == "local_window_size" else "logits differ"):
        proved(model, made, path, tokens=16)


def test_a_window_that_is_wider_by_one_fails_the_proof(tmp_path):
    model = tiny_decoder("mistral", {"sliding_window": 20})

    def widen(graph: ir.Graph) -> None:
        for node in attention_nodes(graph):
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 21)

    made, path = exported(model, tmp_path, widen)
    with pytest.raises(GateError, match="beyond_window"):
        proved(model, made, path, tokens=16)


def test_rotation_inside_attention_is_wrong_where_the_model_normalises_after_rotating():
    """What the proof is for: HunYuan in the form that fits every other family, by hand."""
    model = tiny_decoder("hunyuan_v1_dense", FAMILIES["hunyuan_v1_dense"].config)
    shape = shape_of(model)
    seen, found = observe(model, shape), find_fusions(model, shape)
    tables = rotary_tables(model, seen.rotary_calls, shape.context_tokens)
    inside = type(found)(Rotation("attention"), tables, found.norms, found.cache_head_dim)
    assert mismatch(model, shape, inside, seen) == "layer 0 attends otherwise"
    assert mismatch(model, shape, found, seen) is None


def test_a_rotation_that_no_operator_computes_stays_in_plain_operators_and_is_told(tmp_path, monkeypatch):
    original = modeling_llama.apply_rotary_pos_emb

    def stretched(query, key, cos, sin, unsqueeze_dim=1):
        stretch = torch.linspace(1, 2, cos.shape[-1])  # no rotation: both halves of a pair differ
        return original(query, key, cos * stretch, sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", stretched)
    model = tiny_decoder("llama", {})
    made, path = exported(model, tmp_path)
    proved(model, made, path)
    assert made.fusions.rotation.place == "plain"
    assert describe(made)["not_fused"][0] == "rotation in plain operators: no operator computes it"


def test_a_norm_that_is_none_stays_in_plain_operators_and_is_told(tmp_path, monkeypatch):
    original = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, values: original(self, values) + 0.1)
    model = tiny_decoder("llama", {})
    made, path = exported(model, tmp_path)
    proved(model, made, path)
    assert Counter(node.op_type for node in made.graph.graph)["SimplifiedLayerNormalization"] == 0
    assert describe(made)["not_fused"] == ["LlamaRMSNorm in plain operators: its numbers are those of no norm operator"]


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("falcon", {}, "0 of 2 layers call attention through transformers' interface"),
        ("gptj", {"rotary_dim": 8}, "0 of 2 layers"),
        ("bloom", {}, "0 of 2 layers"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "0 of 2 layers"),
        ("diffllama", {}, "4 of 2 layers"),
        ("youtu", {"num_key_value_heads": 4}, "keys and values have different sizes"),
        ("mellum", {"head_dim": 16}, "torch's ONNX exporter cannot write it"),
    ],
)
def test_other_families_are_refused_by_name_in_one_line(family, config, reason):
    model = tiny_decoder(family, config)
    with pytest.raises(UserError) as refused:
        export(model, shape_of(model))
    message = str(refused.value)
    assert message.startswith(f"{family}: ") and reason in message and "; use " in message and "\n" not in message


def test_frequencies_that_change_with_the_length_are_refused():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_decoder("llama", {"rope_parameters": scaling})
    with pytest.raises(UserError, match="rotary type 'dynamic' changes with the length"):
        export(model, shape_of(model))


def test_windows_longer_than_the_context_need_no_longer_proof():
    model = tiny_decoder("mistral", {"sliding_window": CONTEXT})
    assert find_fusions(model, shape_of(model)).windows == ()
    assert find_fusions(tiny_decoder("mistral", {"sliding_window": WINDOW}), shape_of(model)).windows == (WINDOW,)
