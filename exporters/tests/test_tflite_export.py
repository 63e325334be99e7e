"""The TFLite export on tiny random models: parity in both runtimes, weights stored once, stable bytes, refused operators."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CONTEXT, VOCABULARY, tiny_model, tiny_tokenizer
from exporters import tflite_export
from exporters.settings import TfliteSettings
from exporters.tflite_parity import Feeds, check_alive, check_parity, prompt_feeds
from exporters.tflite_structure import (
    OPERATOR_NAMES,
    TFLITE_RUNTIME_2_14,
    Operator,
    check_loadable,
    operators,
    read_model,
    tensor_contract,
)
from models.checkpoint import load_model, shape_of
from models.errors import GateError

SETTINGS = TfliteSettings(prefill_tokens=[12, 4], context_tokens=48)


def randomised_checkpoint(folder: Path, family: str) -> Path:
    """A checkpoint whose biases and norms are not the zeros and ones that a converter folds away."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tflite_text")
    np.save(folder / "calibration.npy", np.random.default_rng(0).integers(0, VOCABULARY, (8, 40)).astype(np.int32))
    return folder


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3", "gpt2"])
def exported(request, tmp_path_factory, text_folder) -> Path:
    """Folder with ``model`` and the finished stage in ``out``; the stage itself checks parity in both runtimes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(f"tflite_{request.param}")
    randomised_checkpoint(folder / "model", request.param)
    (folder / "out").mkdir()
    tflite_export.run(SETTINGS, folder / "out", model=folder / "model", text=text_folder)
    return folder


def test_parity_and_sidecar(exported):
    sidecar = json.loads((exported / "out" / "tflite_fp32.json").read_text())
    assert sidecar["interface"]["prefill_tokens"] == [4, 12] and sidecar["interface"]["context_tokens"] == 48
    lengths = sidecar["measured"]["prompt_tokens"]  # shorter than, equal to and longer than a call
    assert lengths == {"prefill_4": [2, 4, 11], "prefill_12": [6, 12, 27]}
    for runtime in ("litert", "tflite"):
        parity = sidecar["measured"]["parity"][runtime]
        assert max(parity["max_abs_diff_prompt"], parity["max_abs_diff_decode"]) <= SETTINGS.max_abs_diff
        assert parity["xnnpack_delegates"] > 0
    assert str(exported) not in json.dumps(sidecar)


def test_tensor_contract(exported):
    contract = tensor_contract(read_model(exported / "out" / "tflite_fp32.tflite"))
    shape = shape_of(load_model(exported / "model"))
    cache = {f"{part}_{layer}": ("float32", [1, shape.kv_heads, 48, shape.head_dim]) for part in "kv" for layer in range(2)}
    assert list(contract) == ["decode", "prefill_4", "prefill_12"]  # the Interpreter API shows the tensors of the first alone
    for name, chunk in (("decode", 1), ("prefill_4", 4), ("prefill_12", 12)):
        expected = {"tokens": ("int32", [1, chunk]), "positions": ("int32", [1, chunk])}
        expected |= {"mask": ("float32", [1, 1, chunk, 48 + chunk])} | cache
        expected |= {"last": ("int32", [1])} if name != "decode" else {}
        assert {entry["name"]: (entry["dtype"], entry["shape"]) for entry in contract[name]["inputs"]} == expected
        outputs = {entry["name"]: entry["shape"] for entry in contract[name]["outputs"]}
        assert outputs.pop("logits") == [1, VOCABULARY]
        assert outputs == {f"new_{part}": [1, shape.kv_heads, chunk, shape.head_dim] for part in cache}


def test_weights_are_shared(exported):
    """All signatures and the tied head read the same bytes, and the file is hardly larger than the parameters."""
    path = exported / "out" / "tflite_fp32.tflite"
    found = operators(read_model(path))
    buffers = {
        name: [op.inputs[1].buffer for op in found if op.signature == name and op.name in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")]
        for name in ("decode", "prefill_4", "prefill_12")
    }
    assert buffers["prefill_4"] == buffers["prefill_12"] == buffers["decode"]
    assert buffers["decode"][0] == buffers["decode"][-1]  # embedding and head
    assert path.stat().st_size < 4 * shape_of(load_model(exported / "model")).parameters + 120_000
    assert b"/root/" not in path.read_bytes() and str(exported).encode() not in path.read_bytes()


def test_same_bytes_from_another_process(exported, text_folder, tmp_path):
    if "llama" not in exported.name:
        pytest.skip("one family is enough")
    script = f"""
        from pathlib import Path
        from exporters import tflite_export
        from exporters.settings import TfliteSettings
        tflite_export.run(TfliteSettings(prefill_tokens=[12, 4], context_tokens=48), Path({str(tmp_path)!r}),
                          model=Path({str(exported / "model")!r}), text=Path({str(text_folder)!r}))
    """
    root = Path(tflite_export.__file__).parents[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=root, capture_output=True)
    for name in ("tflite_fp32.tflite", "tflite_fp32.json"):
        assert (tmp_path / name).read_bytes() == (exported / "out" / name).read_bytes()


def test_a_difference_is_a_gate_error(exported):
    feeds = Feeds(np.full((1, 8), 5, np.int32), np.array([6], np.int32))
    with pytest.raises(GateError, match="differs from PyTorch"):
        check_parity(exported / "out" / "tflite_fp32.tflite", "prefill_4", feeds, np.zeros((1, 3, VOCABULARY), np.float32), 5e-5)


def test_weak_scores_do_not_leak_to_empty_slots(tmp_path, text_folder):
    """A head whose real scores are all far below zero must not attend to the empty slots, which score 0 minus the mask."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:  # biases of opposite sign: every score is about -16 * 2 * 4 / 4 = -32
            layer.self_attn.q_proj.bias[:] = 3.0
            layer.self_attn.k_proj.bias[:] = -3.0
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    tflite_export.run(SETTINGS, tmp_path / "out", model=tmp_path / "model", text=text_folder)


def test_prompts_of_all_kinds_fit_the_context():
    windows = np.arange(100, dtype=np.int32).reshape(5, 20)
    feeds = prompt_feeds(windows, prefill_tokens=64, context_tokens=CONTEXT, steps=4)
    assert feeds.prompt_tokens.tolist() == [32, 64, CONTEXT - 4] and feeds.steps == 4
    assert feeds.tokens.shape == (3, CONTEXT)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.full((1, 2, 4), np.nan), "not finite"),
        (np.zeros((1, 2, 4)), "all zero"),
        (np.ones((1, 2, 4)), "constant"),
        (np.tile(np.arange(4.0), (1, 2, 1)), "do not depend"),
    ],
)
def test_dead_logits_are_named(logits, message):
    with pytest.raises(GateError, match=message):
        check_alive(logits, "x.tflite")


def test_refused_operators_are_named(exported):
    found = operators(read_model(exported / "out" / "tflite_fp32.tflite"))
    linear = next(operator for operator in found if operator.name == "FULLY_CONNECTED")
    check_loadable(found, "tflite_fp32")
    for name, version in (("FULLY_CONNECTED", 12), ("STABLEHLO_COMPOSITE", 1)):
        with pytest.raises(GateError, match=name):
            check_loadable([Operator("decode", name, version, linear.inputs, linear.outputs)], "tflite_fp32")


def test_operator_table_is_what_the_runtime_registers(exported, tmp_path):
    """Every version in the table loads in tflite-runtime, and the next one does not."""
    if "llama" not in exported.name:
        pytest.skip("the table does not depend on the model")
    script = tmp_path / "probe.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema
        from tflite_runtime.interpreter import Interpreter
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(open(sys.argv[1], "rb").read(), 0))
        wrong, known = [], list(model.operatorCodes)
        for name, code, limit in json.loads(sys.argv[2]):
            for version in (limit, limit + 1):
                added = schema.OperatorCodeT()
                added.builtinCode, added.deprecatedBuiltinCode, added.version = code, min(code, 127), version
                model.operatorCodes = [*known, added]
                builder = flatbuffers.Builder(1024)
                builder.Finish(model.Pack(builder), b"TFL3")
                try:
                    Interpreter(model_content=bytes(builder.Output()))
                    loads = True
                except ValueError:
                    loads = False
                if loads != (version == limit):
                    wrong.append((name, version))
        print(json.dumps(wrong))
        """)
    )
    codes = {name: code for code, name in OPERATOR_NAMES.items()}
    table = json.dumps([(name, codes[name], limit) for name, limit in TFLITE_RUNTIME_2_14.items()])
    model = str(exported / "out" / "tflite_fp32.tflite")
    done = subprocess.run([sys.executable, str(script), model, table], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


def test_bytes_read_per_token_are_all_weights_but_positions(exported):
    model = load_model(exported / "model")
    read = sum(weight.numel() for name, weight in model.named_parameters() if "wpe" not in name)
    told = json.loads((exported / "out" / "tflite_fp32.json").read_text())["bytes_read_per_token"]
    assert told == pytest.approx(read * 4, rel=0.01)  # constants of the graph more; equal norms and biases are stored once
