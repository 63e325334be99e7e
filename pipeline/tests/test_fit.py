"""The arithmetic of sizes against what it predicts: real modules, real caches, real exports, and what was measured."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import tiny_model
from exporters import onnx_export, onnx_weight_only_int8, tflite_export
from exporters.onnx_files import ONE_FILE_BYTES
from exporters.settings import OnnxSettings, OnnxWeightOnlyInt8Settings
from models.errors import GateError, UserError
from models.families import SUPPORTED_FAMILIES
from pipeline import fit as reckoning
from pipeline import fit_shape, fit_sizes, fit_table
from pipeline.cli import app
from pipeline.fit import Question, fit, prune_settings
from pipeline.fit_shape import config_of, parameters, presets, pruned, shape_of_config
from pipeline.fit_sizes import Blocks, deflated_share, formats, kv_cache_bytes, size_of
from pipeline.recipe import DEMO, ROOT
from pipeline.structure_sizes import heads_for, planned_sizes

REPORT = ROOT / "docs" / "demo-report.json"
LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIGS = {
    **presets(),
    "llama untied": LLAMA,
    "llama without kv heads": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "llama with biases": {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True},
    "qwen2 untied": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 32},
    "qwen3 with biases": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "gpt2 with its own width": {**GPT2, "n_inner": 40},
    "gpt2 untied": {**GPT2, "tie_word_embeddings": False},
}


def modules_of(config: dict) -> torch.nn.Module:
    """The real modules of a config, without memory."""
    facts = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **facts))
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_modules(name):
    model = modules_of(CONFIGS[name])
    counted = parameters(shape_of_config(CONFIGS[name], name))
    named = {label: parameter.numel() for label, parameter in model.named_parameters()}
    assert counted.total == sum(named.values())
    norms = {label for label in named if "norm" in label or ".ln_" in label}
    parts = {"attention": ("self_attn.", ".attn."), "ffn": (".mlp.",), "head": ("lm_head",), "positions": ("wpe",)}
    for part, marks in parts.items():
        inside = {label for label in named.keys() - norms if any(mark in label for mark in marks)}
        assert getattr(counted, part) == sum(named[label] for label in inside), part
    assert counted.norms == sum(named[label] for label in norms)


def test_the_list_of_families_and_limits_is_that_of_the_exporters():
    assert fit_shape.FAMILIES == SUPPORTED_FAMILIES
    assert fit_sizes.ONE_FILE_BYTES == ONE_FILE_BYTES and fit_sizes.TFLITE_BYTES == tflite_export.FILE_LIMIT_BYTES


def test_predictions_are_within_3_percent_of_the_measured_demo_artifacts():
    report = json.loads(REPORT.read_text())
    found = fit(str(REPORT), Question())
    measured = {artifact["name"]: artifact["bytes"] for artifact in report["artifacts"]}
    assert {item.artifact: item.measured for item in found.compared} == measured
    for item in found.compared:
        assert abs(item.predicted / measured[item.artifact] - 1) < 0.03, item.artifact
    reckoning.require_close(found)
    pruning = ",".join(f"{key}={report['recipe']['prune'][key]}" for key in ("ffn", "layers", "kv_groups"))
    assert fit("demo", Question(prune=prune_settings(pruning))).shape == found.shape  # the dense config, pruned by arithmetic


def test_a_prediction_that_is_off_fails_the_comparison(tmp_path):
    report = json.loads(REPORT.read_text())
    report["artifacts"][1]["bytes"] = round(report["artifacts"][1]["bytes"] * 1.05)
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(GateError, match="onnx_static_int8.*-4.8%"):
        reckoning.require_close(fit(str(tmp_path), Question()))
    report["pruned"]["shape"]["ffn_size"] += 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="its sizes make"):
        fit(str(tmp_path), Question())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exports_of_three_layers_have_the_predicted_bytes(family, tmp_path):
    """The graphs' bytes were measured on two and four layers."""
    text = tmp_path / "text"
    text.mkdir()
    for name, count in (("calibration", 6), ("validation", 2)):
        np.save(text / f"{name}.npy", np.random.default_rng(0).integers(0, 384, (count, 40), dtype=np.int32))
    model = tiny_model(family, layers=3)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases of zeros and norms of ones would be stored once for all
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "int8").mkdir()
    onnx_export.run(OnnxSettings(greedy_tokens=1), tmp_path / "onnx", model=tmp_path / "model", text=text)
    onnx_weight_only_int8.run(OnnxWeightOnlyInt8Settings(block=32), tmp_path / "int8", onnx=tmp_path / "onnx", text=text)
    shape = shape_of_config(config_of(str(tmp_path / "model")), family)
    known = {form.name: form for form in formats(Blocks(int8=32))}
    for file in (tmp_path / "onnx" / "onnx_fp32.onnx", tmp_path / "int8" / "onnx_weight_only_int8.onnx"):
        assert size_of(shape, known[file.stem]).disk == pytest.approx(file.stat().st_size, rel=0.03)
    weights = tmp_path / "model" / "model.safetensors"
    assert size_of(shape, known["checkpoint_fp32"]).disk == pytest.approx(weights.stat().st_size, rel=0.005)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_cache_is_that_of_the_model(family):
    model = tiny_model(family)
    shape = shape_of_config(model.config.to_dict(), family)
    layers = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values.layers
    held = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(shape, 7, 4) == held


def test_a_token_reads_all_weights_but_an_embedding_that_is_no_head():
    for name in ("llama-3-8b", "smollm2-135m"):
        shape = shape_of_config(config_of(name), name)
        counted = parameters(shape)
        read = counted.total - (0 if shape.tied else counted.embedding)
        by_name = {size.name: size for size in fit(name, Question()).sizes}
        assert by_name["checkpoint_fp16"].read_per_token == 2 * read
        assert by_name["tflite_weight_only_int8"].read_per_token == 4 * read  # made float again when it is loaded
        assert by_name["onnx_static_int8"].read_per_token == pytest.approx(read, rel=0.02)
        assert by_name["onnx_weight_only_int4"].read_per_token < 0.9 * read  # blocks of 16: half a byte and a quarter of scales


def test_speed_is_bound_by_bandwidth_and_memory_decides_what_fits():
    share = 0.5
    found = fit("qwen2.5-0.5b", Question(contexts=(512, 4096), memory_share=share))
    by_name = {size.name: size for size in found.sizes}
    known = {device.name: device for device in reckoning.devices()}
    for item in found.devices:
        size, device = by_name[item.format], known[item.device]
        cache = found.kv_cache[4096][{"checkpoint_fp16": "fp16", "tflite_full_int8": "int8"}.get(item.format, "fp32")]
        assert item.tokens_per_s * (size.read_per_token + cache) == pytest.approx(device.bandwidth_gb_s * 1e9)
        assert item.fits == (size.memory + cache <= share * device.memory_gib * 2**30)
    eight_bits = next(
        i for i in fit("qwen2.5-0.5b", Question((128,))).devices if (i.device, i.format) == ("Raspberry Pi 5", "onnx_static_int8")
    )
    assert eight_bits.tokens_per_s == pytest.approx(19.9, rel=0.1)  # llama.cpp's Q8_0 on that device
    assert not any(item.fits for item in fit("gpt3-175b", Question()).devices)


def test_what_deflate_leaves_of_sparse_int8():
    """Between the entropy of the codes and a tenth more; and so for the demo's real weights too."""
    weight = load_file(DEMO / "model.safetensors")["model.layers.3.mlp.gate_proj.weight"].float().numpy()
    for sparsity in (0.0, 0.5, 0.9):
        cut = np.where(np.abs(weight) > np.quantile(np.abs(weight), sparsity), weight, 0) if sparsity else weight
        covered = np.maximum(np.abs(cut).max(1, keepdims=True), 1e-9)  # a row may be empty
        codes = np.rint(cut / covered * 127).astype(np.int8)
        shares = np.unique(codes, return_counts=True)[1] / codes.size
        entropy = -(shares * np.log2(shares)).sum() / 8
        packed = len(zlib.compress(codes.tobytes(), 9)) / codes.size
        assert entropy < packed < 1.6 * entropy
        assert deflated_share("int8", sparsity) == pytest.approx(packed, rel=0.1)


def test_sparsity_changes_the_download_alone():
    shape = shape_of_config(config_of("demo"), "demo")
    form = next(form for form in formats(Blocks()) if form.name == "onnx_static_int8")
    sizes = [size_of(shape, form, sparsity) for sparsity in (0.0, 0.5, 0.9)]
    assert len({(size.disk, size.read_per_token, size.memory) for size in sizes}) == 1
    assert sizes[0].download > sizes[1].download > sizes[2].download > parameters(shape).embedding * 0.8  # which is not pruned
    assert any(size.name.endswith("70% sparse") for size in fit("demo", Question(prune=prune_settings("sparsity=0.7"))).sizes)


PRUNINGS = (
    "ffn=0.5",
    "ffn=0.33,layers=2",
    "kv_groups=0.5",
    "kv_groups=0.25,hidden=0.5",
    "hidden=0.3",
    "kv_groups=0.75",
    "ffn=0.001",
    "kv_groups=0.1",
)


@pytest.mark.parametrize("name", ["demo", "gpt2", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m"])
def test_pruned_shapes_are_those_of_the_prune_stage(name):
    """The stage plans on a model; what it refuses is refused here."""
    model, shape = modules_of(presets()[name]), shape_of_config(presets()[name], name)
    for text in PRUNINGS:
        settings = prune_settings(text)
        try:
            planned = planned_sizes(settings, model)
        except UserError:
            with pytest.raises(UserError):
                pruned(shape, settings)
            continue
        left = pruned(shape, settings)
        assert (left.layers, left.ffn_size, left.kv_heads, left.hidden_size) == (
            planned.layers, planned.ffn_size, planned.kv_heads, planned.hidden_size,
        )  # fmt: skip
        assert left.heads == heads_for(model, planned.kv_heads)


def test_prunings_that_cannot_be_reckoned():
    for text in ("ffn=0.999", "layers=6", "kv_groups=0.95", "target=0.5", "hidden=0.999"):
        with pytest.raises(UserError, match=text.split("=")[0]):
            fit("demo", Question(prune=prune_settings(text)))
    with pytest.raises(UserError, match="GPT-2"):
        fit("gpt2", Question(prune=prune_settings("kv_groups=0.5")))
    with pytest.raises(UserError, match="pruned already"):
        fit(str(REPORT), Question(prune=prune_settings("ffn=0.5")))


@pytest.mark.parametrize(
    "config, message",
    [
        *(
            ({key: value for key, value in LLAMA.items() if key != gone}, f"{gone} is missing")
            for gone in ("vocab_size", "intermediate_size")
        ),
        ({key: value for key, value in GPT2.items() if key != "n_layer"}, "n_layer is missing"),
        ({**LLAMA, "model_type": "qwen2", "num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({**LLAMA, "model_type": "mamba"}, "mamba"),
        ({**LLAMA, "hidden_size": 0}, "hidden_size is 0"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size is '64'"),
        ({**LLAMA, "hidden_size": 66}, "head_dim is missing"),
        ({**LLAMA, "num_key_value_heads": 3}, "no multiple of 3"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({**GPT2, "n_head": 5}, "n_head 5"),
        ([], "no JSON object"),
    ],
)
def test_a_config_that_cannot_be_reckoned_with(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        fit(str(tmp_path / "config.json"), Question())


def test_bad_questions(tmp_path):
    (tmp_path / "config.json").write_text("{")
    for config, question, message in (
        ("nowhere", Question(), "neither a file nor a preset"),
        (str(tmp_path), Question(), "not readable as JSON"),
        ("demo", Question(contexts=(2000,)), "--context 2000"),
        ("demo", Question(memory_share=0.0), "--memory-share"),
    ):
        with pytest.raises(UserError, match=message):
            fit(config, question)
    with pytest.raises(UserError, match="ffn = 2"):
        prune_settings("ffn=2")
    with pytest.raises(UserError, match="nothing measured"):
        reckoning.require_close(fit("demo", Question()))


def test_the_command_prints_the_same_numbers_twice_over():
    done = CliRunner().invoke(app, ["fit", "--config", str(REPORT), "--compare", "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    found = fit(str(REPORT), Question())
    assert record["parameters"]["total"] == json.loads(REPORT.read_text())["pruned"]["parameters"]
    assert [size["disk"] for size in record["sizes"]] == [size.disk for size in found.sizes]
    assert all(device["source"] for device in record["device_table"])
    printed = CliRunner().invoke(app, ["fit", "--config", "gpt3-175b"]).stdout
    assert "174,604,259,328 parameters" in printed and "not made here" in printed
    assert fit_table.told_bytes(174_604_259_328) == "175 GB" and fit_table.told_bytes(12) == "12 B"
    assert replace(found, compared=()).name == str(REPORT)


def test_sizes_are_those_of_the_artifacts_in_the_prices():
    """Block sizes of 4 bits other than the format's default, and every other artifact of the default recipe."""
    shape = pruned(shape_of_config(config_of("demo"), "demo"), prune_settings("ffn=0.5"))
    rows = {row["name"]: row["bytes"] for row in json.loads((ROOT / "docs" / "prices.json").read_text(encoding="utf-8"))["artifacts"]}
    for block, name in ((16, "onnx_weight_only_int4"), (32, "onnx_weight_only_int4, onnx_weight_only_int4: block=32")):
        form = next(form for form in formats(Blocks(int4=block)) if form.name == "onnx_weight_only_int4")
        assert size_of(shape, form).disk == pytest.approx(rows[name], rel=0.03)
    sizes = {size.name: size.disk for size in fit("demo", Question(prune=prune_settings("ffn=0.5"))).sizes}
    known = sizes.keys() & rows.keys()
    assert {"onnx_weight_only_int4", "tflite_weight_only_int8", "tflite_full_int8"} <= known
    # The prices' TFLite rows are older than the signatures for prompts of several lengths, whose graphs the arithmetic counts.
    shorter = {"tflite_static_int8", "tflite_dynamic_int8", "tflite_weight_only_int8"}
    for name in known - shorter:
        assert sizes[name] == pytest.approx(rows[name], rel=0.03), name
    for name in known & shorter:
        assert rows[name] < sizes[name] < 1.11 * rows[name], name
