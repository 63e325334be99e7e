"""Hybrid ONNX: two graphs over one file of weights, as exported and as a host opens them."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from device_tests import onnx_hybrid as host
from device_tests.artifact import read_artifact
from device_tests.errors import DeviceTestError
from device_tests.sessions import open_session as open_host
from exporters import onnx_hybrid_int4, onnx_hybrid_int8
from exporters.onnx_hybrid import GIVEN_BY_THE_HOST, as_int8, require_prompt
from exporters.onnx_prompt_graph import LAST
from exporters.onnx_qdq import linear_layers
from exporters.onnx_session import empty_past, open_session, past_names, run_tokens
from exporters.onnx_structure import Structure, structure_of
from exporters.settings import OnnxHybridInt4Settings, OnnxHybridInt8Settings
from exporters.tests.conftest import CASES, WINDOW
from exporters.weight_blocks import Layout, covering_grid, quantise_matrix
from models.errors import GateError, UserError

VARIANTS = {
    "int8": (onnx_hybrid_int8, OnnxHybridInt8Settings(block=32)),
    "int8, padded blocks": (onnx_hybrid_int8, OnnxHybridInt8Settings(block=128, rounding="nearest", two_step_crest=1.0)),
    "int4": (onnx_hybrid_int4, OnnxHybridInt4Settings(block=16)),
}


@pytest.fixture(scope="module")
def hybrid(exports, text, tmp_path_factory):
    """The artifact's sidecar by case and variant, made when first asked for."""
    made = {}

    def get(case=("llama", True), variant="int8"):
        if (case, variant) not in made:
            module, settings = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("hybrid")
            module.run(settings, folder, onnx=exports[case], text=text)
            made[case, variant] = folder / f"{module.NAME}.json"
        return made[case, variant]

    return get


def windows(text):
    return np.load(text / "validation.npy")


def teacher_forced(session, window, prompt):
    """Logits ``[n, vocab]`` after the prompt and after each further token."""
    session.reset()
    rows = [session.prefill(window[:prompt])]
    return np.stack(rows + [session.step(int(token)).copy() for token in window[prompt:]])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_steps_stay_near_the_fp32_graph(hybrid, exports, text, case, variant):
    """By the host's own library: a long prompt goes through the prompt graph, and is decoded from in the same buffers."""
    session = open_host(hybrid(case, variant), "onnxruntime")
    reference = open_session(next(exports[case].glob("*.onnx")))
    for window in windows(text):
        prompt = WINDOW // 2
        expected = run_tokens(reference, window[None], empty_past(reference, 1))[0][0, prompt - 1 :]
        error = np.abs(teacher_forced(session, window, prompt) - expected).max()
        assert error < (0.35 if variant == "int4" else 0.08) * np.ptp(expected), (case, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_makes_the_prompt_graphs_own_matrices(hybrid, variant, tmp_path):
    """Against ONNX Runtime, which is given them inside the file: the same keys, values and logits, bit by bit."""
    artifact = read_artifact(hybrid(variant=variant))
    given = host.given_matrices(artifact.prompt)
    model = onnx.load(artifact.prompt.path, load_external_data=False)
    missing = {tensor.name for tensor in model.graph.initializer if GIVEN_BY_THE_HOST in str(tensor.external_data)}
    assert missing == set(given) and len(given) == len(artifact.prompt.weights) > 2
    for tensor in model.graph.initializer:
        if tensor.name in given:
            assert list(tensor.dims) == list(given[tensor.name].shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(given[tensor.name], tensor.name))
    shutil.copy(artifact.prompt.data, tmp_path)
    onnx.save(model, tmp_path / "whole.onnx")
    whole = open_session(tmp_path / "whole.onnx")
    session = open_host(hybrid(variant=variant), "onnxruntime")
    ids = np.arange(1, 13, dtype=np.int64)
    names = past_names(whole)
    feeds = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None], **empty_past(whole, 1)}
    logits, *expected = whole.run(["logits", *(name.replace("past_key_values", "present") for name in names)], feeds)
    assert logits.shape == (1, 1, artifact.interface.vocab_size) and np.array_equal(session.prefill(ids), logits[0, 0])
    for name, array in zip(names, expected, strict=True):
        cache = session._caches[name.removeprefix("past_key_values.")][0]
        assert np.array_equal(cache[:, :, : len(ids)], array), name


def test_both_graphs_of_8_bits_have_the_same_numbers(hybrid):
    """Every code of the decode graph less 128 is the prompt graph's int8 weight, and one scale per output serves both."""
    artifact = read_artifact(hybrid())
    decode = onnx.load(artifact.path)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in decode.graph.initializer}
    for name, matrix in host.given_matrices(artifact.prompt).items():
        stem = name.removesuffix("_quantized")
        codes, scales = tensors[f"{stem}.codes"], tensors[f"{stem}.scales"]
        values = (codes.astype(int) - 128).reshape(len(codes), -1)[:, : len(matrix)]
        assert np.array_equal(values.T, matrix) and (scales == scales[:, :1]).all()


def test_weights_are_stored_once_and_the_prompt_graph_holds_none(hybrid, exports):
    record = json.loads(hybrid().read_text())
    sizes = {file["path"]: file["bytes"] for file in record["files"]}
    layers = linear_layers(onnx.load(exports["llama", True] / "onnx_fp32.onnx"))
    assert sizes["onnx_hybrid_int8.data"] < record["bytes"] and sizes["onnx_hybrid_int8.prompt.onnx"] < 60_000
    for graph in ("onnx_hybrid_int8.onnx", "onnx_hybrid_int8.prompt.onnx"):
        for tensor in onnx.load(hybrid().parent / graph, load_external_data=False).graph.initializer:
            assert len(tensor.raw_data) < 64 or tensor.data_location == TensorProto.EXTERNAL, tensor.name
    # as in the decode graph, for the last token alone: behind the last keys and values o, gate, up and down, and the head
    assert len(record["prompt"]["weights"]) == len(layers) - 5 and record["measured"]["prompt_last_token_layers"] == 5
    assert record["measured"]["linear_layers"] == len(layers)


def test_the_decode_graph_is_whole_by_itself(hybrid, text):
    """Any runtime opens it without the prompt graph and feeds it prompts."""
    session, alone = open_host(hybrid(), "onnxruntime"), open_session(hybrid().with_suffix(".onnx"))
    window = windows(text)[0][:6]
    logits = run_tokens(alone, window[None], empty_past(alone, 1))[0][0]
    np.testing.assert_allclose(np.stack([session.step(int(token)).copy() for token in window]), logits, atol=1e-4)


def test_a_prompt_goes_through_the_prompt_graph_however_short_it_is(hybrid, text):
    """Token by token, as where all but the last come from a cache: the same answers as in one piece."""
    session = open_host(hybrid(), "onnxruntime")
    window = windows(text)[0][:12]
    whole = session.prefill(window)
    session.reset()
    singly = [session.prefill(window[place : place + 1]) for place in range(len(window))]
    np.testing.assert_allclose(singly[-1], whole, atol=2e-4 * np.ptp(whole))


def test_chunks_and_one_prompt_give_the_same(hybrid, text, monkeypatch):
    """Only up to rounding: how rows are spread over kernels changes sums, never by more."""
    window = windows(text)[0]
    session = open_host(hybrid(), "onnxruntime")
    whole = teacher_forced(session, window, 30)
    monkeypatch.setattr(host, "CHUNK_TOKENS", 7)
    np.testing.assert_allclose(teacher_forced(session, window, 30), whole, atol=2e-4 * np.ptp(whole))
    session.reset()
    session.prefill(window[:11])
    session.prefill(window[11:30])
    continued = np.stack([session.step(int(token)).copy() for token in window[30:]])
    np.testing.assert_allclose(continued, whole[1:], atol=2e-4 * np.ptp(whole))


def test_a_prompt_s_last_logits_are_those_of_the_same_graph_over_all_its_tokens(hybrid, tmp_path):
    """Taking the last token early changes nothing: the graph with the Slices taken out gives the same in its last row."""
    artifact = read_artifact(hybrid())
    model = onnx.load(artifact.prompt.path, load_external_data=False)
    given = host.given_matrices(artifact.prompt)
    for tensor in model.graph.initializer:
        if tensor.name in given:
            tensor.CopyFrom(onnx.numpy_helper.from_array(given[tensor.name], tensor.name))
    shutil.copy(artifact.prompt.data, tmp_path)
    onnx.save(model, tmp_path / "last.onnx")
    slices = [node for node in model.graph.node if LAST in node.input]
    assert len(slices) == 2, "the attention's output and the residual stream"
    for node in slices:
        node.op_type = "Identity"
        del node.input[1:]
    model.graph.output[-1].type.tensor_type.shape.dim[1].dim_param = "sequence"
    onnx.save(model, tmp_path / "all.onnx")
    last, every = (open_session(tmp_path / name) for name in ("last.onnx", "all.onnx"))
    ids = np.arange(1, 13)[None]
    expected = run_tokens(every, ids, empty_past(every, 1))[0]
    assert expected.shape == (1, 12, artifact.interface.vocab_size)
    got = run_tokens(last, ids, empty_past(last, 1))[0]
    np.testing.assert_allclose(got[0, 0], expected[0, -1], atol=1e-4 * np.ptp(expected))


def test_a_prompt_graph_without_its_matrices_is_not_opened(hybrid):
    """Zeros instead of weights would be silent; there is no file of the name that it asks for."""
    with pytest.raises(Exception, match=GIVEN_BY_THE_HOST):
        open_session(read_artifact(hybrid()).prompt.path)


def test_threads_of_one_graph_do_not_spin_on_the_cores_of_the_other(hybrid):
    """Without a word a prompt takes twice as long with two threads: what the decode graph's threads spin is missing to the prompt's."""
    session = open_host(hybrid(), "onnxruntime")
    for each in (session._session, session._prompt_session):
        assert each.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


class ReadsOurs:
    """A prompt session that goes on reading the matrices that it was given."""

    def __init__(self, session, matrices):
        self.session, self.matrices = session, matrices
        self.get_inputs = session.get_inputs

    def run(self, names, feeds):
        return [
            sum(float(np.abs(matrix.astype(int)).sum()) for matrix in self.matrices.values()) + array
            for array in self.session.run(names, feeds)
        ]


def test_a_session_that_reads_our_matrices_is_given_them_for_good(hybrid, text, monkeypatch):
    """Where a processor has no packed kernel the arrays must stay as they are; else their memory is given back."""
    packed = open_host(hybrid(), "onnxruntime")
    assert packed.kept == ({}, {})
    artifact = read_artifact(hybrid())
    matrices = host.given_matrices(artifact.prompt)
    assert not host.reads_its_own(ReadsOurs(packed._prompt_session, matrices), matrices, artifact.interface)
    monkeypatch.setattr(host, "reads_its_own", lambda session, arrays, interface: [array.fill(0) for array in arrays.values()] == [])
    kept = open_host(hybrid(), "onnxruntime").kept
    assert {name: array.tobytes() for name, array in kept[1].items()} == {
        name: array.tobytes() for name, array in host.given_matrices(artifact.prompt).items()
    }
    assert all(np.shares_memory(kept[0][name].numpy(), array) for name, array in kept[1].items())


def test_a_sidecar_that_lost_its_prompt_graph_is_one_line(hybrid, tmp_path):
    for path in hybrid().parent.iterdir():
        shutil.copy(path, tmp_path)
    sidecar = tmp_path / hybrid().name
    record = json.loads(sidecar.read_text())
    record["prompt"]["data"] = "elsewhere.data"
    sidecar.write_text(json.dumps(record))
    with pytest.raises(DeviceTestError, match="elsewhere.data is not among its files"):
        read_artifact(sidecar)
    del record["prompt"]["weights"]
    sidecar.write_text(json.dumps(record))
    with pytest.raises(DeviceTestError, match="prompt graph is not described"):
        read_artifact(sidecar)


@pytest.mark.parametrize("layout", [Layout(8, 16, True), Layout(4, 16, False), Layout(4, 32, True)], ids=str)
def test_int8_numbers_of_blocks(layout):
    """Within half a step of the row's scale of what the blocks stand for, number by number."""
    draws = np.random.default_rng(0)
    blocks = quantise_matrix(draws.normal(size=(40, 6)).astype(np.float32), layout, covering_grid)
    row_scale = np.abs(blocks.values()).max(1) / 127
    matrix = as_int8(blocks, row_scale.astype(np.float32))
    assert matrix.shape == (40, 6) and np.abs(matrix).max() == 127
    assert np.abs(matrix * row_scale - blocks.values().T).max() <= 0.5001 * row_scale.max()


def test_windows_without_a_prompt_are_refused_by_the_stage_s_own_name(exports, text, tmp_path):
    settings = OnnxHybridInt8Settings(decode_steps=WINDOW)
    with pytest.raises(UserError, match=f"onnx_hybrid_int8.decode_steps {WINDOW} leaves no prompt"):
        onnx_hybrid_int8.run(settings, tmp_path, onnx=exports["llama", True], text=text)
    assert not list(tmp_path.iterdir())


def test_a_prompt_layer_that_is_float_fails_by_name(hybrid):
    structure = structure_of(hybrid().with_suffix(".onnx"))
    broken = Structure(("a",), (), ("b.weight",), (), (), structure.float_tables)
    with pytest.raises(GateError, match="prompt graph: 1 float products with a constant matrix.*b.weight"):
        require_prompt(broken, 2, (), "onnx_hybrid_int8")
    with pytest.raises(GateError, match="1 int8 linear layers, expected 2"):
        require_prompt(Structure(("a",), (), (), (), (), ()), 2, (), "onnx_hybrid_int8")
    with pytest.raises(GateError, match="prompt graph: 0 weight-only linear layers, expected 1"):
        require_prompt(Structure(("a",), (), (), (), (), ()), 1, ("head",), "onnx_hybrid_int8")
