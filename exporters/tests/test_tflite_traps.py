"""Everything that makes a TFLite file slow, large or wrong without a word, built on purpose: each has a check that fails the build."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import compiled_model
from ai_edge_litert import interpreter as litert
from ai_edge_quantizer import qtyping, quantizer

from conftest import VOCABULARY, write_checkpoint
from device_tests.tflite_compiled import CompiledCalls
from exporters import tflite_equalise, tflite_export, tflite_int8
from exporters.settings import TfliteInt8Settings, TfliteSettings
from exporters.tflite_calibration import calibrate
from exporters.tflite_coverage import Expected, check_coverage, check_last_row, check_packed_once, check_shared
from exporters.tflite_edit import BIAS, WEIGHT, add_constant
from exporters.tflite_model import SignatureModule
from exporters.tflite_parity import Feeds, check_accelerated, replay
from exporters.tflite_replay import Replay, delegated_pieces, replay_all
from exporters.tflite_signatures import copy_with, signatures_of, usual_prefill
from exporters.tflite_structure import OPERATOR_NAMES, operators, read_model, write_model
from models.errors import GateError

SETTINGS = TfliteSettings(prefill_tokens=(4, 12), context_tokens=48)
ROOT = Path(tflite_export.__file__).parents[1]
LINEAR = qtyping.TFLOperationName.FULLY_CONNECTED
LOOKUP = qtyping.TFLOperationName.EMBEDDING_LOOKUP
PER_TENSOR = qtyping.QuantGranularity.TENSORWISE


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traps_text")
    for seed, name in enumerate(("calibration", "validation")):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, VOCABULARY, (4, 40)).astype(np.int32))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, text_folder) -> Path:
    """The float file of a tiny Llama."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("traps")
    write_checkpoint(folder / "model", "llama")
    tflite_export.run(SETTINGS, folder, model=folder / "model", text=text_folder)
    return folder / "tflite_fp32.tflite"


def export_again(exported: Path, text_folder: Path, out: Path) -> None:
    tflite_export.run(SETTINGS, out, model=exported.parent / "model", text=text_folder)


@pytest.mark.parametrize("order", ["runner first", "tensors first"])
def test_runners_asked_for_before_the_tensors_are_allocated_lose_xnnpack(exported, order):
    """tflite-runtime 2.14 then computes with plain kernels. The build asks each replay, which does it in the right order."""
    script = """
        import sys
        from tflite_runtime.interpreter import Interpreter
        from exporters.tflite_replay import delegated_pieces
        interpreter = Interpreter(sys.argv[1])
        if sys.argv[2] == "tensors first":
            interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner("decode")
        details = runner.get_input_details()
        import numpy as np
        runner(**{name: np.zeros(tensor["shape"], tensor["dtype"]) for name, tensor in details.items()})
        print(delegated_pieces(interpreter))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(exported), order]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    pieces = int(done.stdout)
    if order == "tensors first":
        check_accelerated(pieces, "file")
    else:
        with pytest.raises(GateError, match="XNNPACK took over no operator"):
            check_accelerated(pieces, "file")


def test_an_interpreter_without_xnnpack_is_named(exported):
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(str(exported), experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    with pytest.raises(GateError, match="XNNPACK took over no operator"):
        check_accelerated(delegated_pieces(interpreter), "file")


def test_a_cache_that_is_copied_in_the_graph_is_named(exported, text_folder, tmp_path, monkeypatch):
    """What the converter writes by itself: reshapes and transposes of the whole cache in every call."""
    monkeypatch.setattr(tflite_export, "read_cache_in_place", lambda graph: 0)
    with pytest.raises(GateError, match=r"copies the cache [kv]_0 in every call"):
        export_again(exported, text_folder, tmp_path)


def test_logits_of_every_token_are_named(exported, text_folder, tmp_path, monkeypatch):
    """The same answers, but the head, a third of a small model, multiplies all rows of a prompt."""

    class AllRows(SignatureModule):
        def forward(self, tokens, positions, mask, last=None, **cached):
            named = super().forward(tokens, positions, mask, None if last is None else torch.arange(tokens.shape[1]), **cached)
            return named

    monkeypatch.setattr(tflite_export, "SignatureModule", AllRows)
    with pytest.raises(GateError, match=r"prefill_4 computes 4 rows of logits"):
        export_again(exported, text_folder, tmp_path)


def test_logits_of_one_token_pass(exported):
    check_last_row(operators(read_model(exported)), "file")


def test_a_weight_stored_again_for_one_signature_is_named(exported, text_folder, tmp_path, monkeypatch):
    """By the buffers that signatures read, and by the size of all constants."""
    graph = read_model(exported)
    prefill = graph.subgraphs[1]
    linear = next(op for op in prefill.operators if OPERATOR_NAMES[graph.operatorCodes[op.opcodeIndex].builtinCode] == "FULLY_CONNECTED")
    tensor = prefill.tensors[linear.inputs[WEIGHT]]
    tensor.buffer = add_constant(graph, graph.buffers[tensor.buffer].data.view(np.float32))
    found = operators(graph)
    with pytest.raises(GateError, match="in (decode|prefill_4) reads a weight that (decode|prefill_4|prefill_12) does not read"):
        check_shared(found, "file")
    check_shared(operators(read_model(exported)), "file")

    def store_all_again(graph):
        for subgraph in graph.subgraphs[1:]:
            for each in subgraph.tensors:
                data = graph.buffers[each.buffer].data
                if data is not None and len(data) > 1000:
                    each.buffer = add_constant(graph, data.view(np.float32))
        return 0

    kept = tflite_export.decode_first
    monkeypatch.setattr(tflite_export, "decode_first", lambda graph: (kept(graph), store_all_again(graph)))
    with pytest.raises(GateError, match="stored twice"):
        export_again(exported, text_folder, tmp_path)


@pytest.mark.parametrize(
    ("operation", "message"),
    [(LOOKUP, "EMBEDDING_LOOKUP .* reads a float32 table, not int8"), (LINEAR, "is not int8: .*weight is float32")],
)
def test_weights_that_are_made_float_again_are_named(exported, text_folder, tmp_path, operation, message):
    """A table or a weight behind DEQUANTIZE is unpacked whole, and kept twice in memory."""
    ranges = calibrate(exported, operators(read_model(exported)), np.load(text_folder / "calibration.npy")[:1], decode_steps=4).ranges
    process = quantizer.Quantizer(str(exported))
    if operation == LOOKUP:
        process.add_static_config(".*", LINEAR, 8, 8, PER_TENSOR)
        process.add_weight_only_config(".*", LOOKUP, 8, PER_TENSOR)
    else:
        process.add_dynamic_config(".*", LOOKUP, 8, PER_TENSOR)
        process.add_weight_only_config(".*", LINEAR, 8, PER_TENSOR)
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(tflite_int8.quantised_with(process, ranges))
    with pytest.raises(GateError, match=message):
        check_coverage(operators(read_model(broken)), Expected(operators(read_model(exported))), "tflite_static_int8")


def test_dynamic_weights_with_a_scale_per_channel_are_dead_in_tflite_runtime(exported, tmp_path):
    """They load, and every logit is zero."""
    process = quantizer.Quantizer(str(exported))
    process.add_dynamic_config(".*", LINEAR, 8, qtyping.QuantGranularity.CHANNELWISE)
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(process.quantize(None, enable_progress_bar=False, enable_progress_report=False).quantized_model)
    feeds = Feeds(np.random.default_rng(0).integers(0, VOCABULARY, (1, 20)).astype(np.int32), np.array([12], np.int32))
    with pytest.raises(GateError, match="all zero"):
        replay(broken, "tflite", feeds)


def test_parts_of_a_layer_that_the_weight_cache_takes_for_one_are_named(exported, text_folder, tmp_path, monkeypatch):
    """LiteRT's weight cache then gives wrong logits where the Interpreter, which has none, gives right ones."""
    monkeypatch.setattr(tflite_equalise, "SPLIT_GAIN", 0.0)  # every layer is cut in two
    windows = np.load(text_folder / "calibration.npy")
    chosen = TfliteInt8Settings(windows=2, decode_steps=6, dynamic=())
    prepared = tflite_int8.prepare(chosen, exported, windows, tmp_path / "equalised.tflite")
    assert prepared.split_layers > 0
    sound, broken = tmp_path / "sound.tflite", tmp_path / "broken.tflite"
    tflite_int8.write(prepared, (), sound)
    check_packed_once(operators(read_model(sound)), "file")
    graph = read_model(prepared.path)
    for subgraph in graph.subgraphs:
        for operator in subgraph.operators:
            if len(operator.inputs) > BIAS and operator.inputs[BIAS] >= 0 and b"no_bias" in subgraph.tensors[operator.inputs[BIAS]].name:
                operator.inputs = [*map(int, operator.inputs[:BIAS]), -1]
    write_model(graph, tmp_path / "equalised.tflite")
    tflite_int8.write(prepared, (), broken)
    with pytest.raises(GateError, match="LiteRT's weight cache takes both for one"):
        check_packed_once(operators(read_model(broken)), "file")
    different = {}
    for path in (sound, broken):
        calls = CompiledCalls(path, ["decode"], 1, compiled_model)
        interpreter = litert.Interpreter(str(path))
        interpreter.allocate_tensors()
        calls.feeds("decode")["tokens"][:] = 9
        feeds = {**calls.feeds("decode"), **calls.caches}
        alone = interpreter.get_signature_runner("decode")(**feeds)
        different[path] = np.abs(calls.run("decode")["logits"] - alone["logits"]).max()
    assert different[sound] == 0, "the check lets a file pass that the weight cache computes wrongly"
    assert different[broken] > 0, "this LiteRT's weight cache knows scales; check_packed_once is not needed any more"


def test_a_copy_with_fewer_signatures_computes_the_same(exported, tmp_path):
    """What replays and calibration open, so that the weights are not packed for signatures that nobody calls."""
    assert signatures_of(exported) == ["decode", "prefill_4", "prefill_12"] and usual_prefill(signatures_of(exported)) == "prefill_12"
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 30)).astype(np.int32)
    found = {}
    for name in ("prefill_4", "prefill_12"):
        path = copy_with(exported, ("decode", name), tmp_path / f"{name}.tflite")
        assert signatures_of(path) == ["decode", name] and path.stat().st_size == exported.stat().st_size
        interpreter = litert.Interpreter(str(path))
        assert interpreter.num_subgraphs() == 2
        found[name] = replay_all(Replay(interpreter), tokens, np.array([20, 11]))
    whole = replay_all(Replay(litert.Interpreter(str(exported)), "prefill_12"), tokens, np.array([20, 11]))
    np.testing.assert_array_equal(found["prefill_12"], whole)
    np.testing.assert_allclose(found["prefill_4"], whole, atol=1e-4)


def test_the_traps_above_are_traps_of_the_file(exported, tmp_path):
    """The unchanged graph passes every check that the tests above see fail."""
    graph = copy.deepcopy(read_model(exported))
    write_model(graph, tmp_path / "same.tflite")
    assert (tmp_path / "same.tflite").read_bytes() == exported.read_bytes()
    found = operators(graph)
    check_shared(found, "file")
    check_last_row(found, "file")
    check_packed_once(found, "file")
