"""The loop around ONNX Runtime: what is shared, what is copied, and prompts in chunks."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from device_tests import onnx_session
from device_tests.__main__ import main
from device_tests.errors import ArtifactFailure
from device_tests.onnx_session import OnnxSession, cache_names
from device_tests.sessions import open_session
from device_tests.tests.toy import CONTEXT, INTERFACE, VOCABULARY, ToyModel, write_onnx, write_sidecar, write_vectors

TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, CONTEXT)


@pytest.fixture
def sidecar(tmp_path):
    return write_onnx(ToyModel(0), tmp_path / "toy.onnx")


def test_past_and_present_are_one_buffer(sidecar):
    session = open_session(sidecar, "onnxruntime")
    before = {name: cache.ctypes.data for name, cache in session.caches().items()}
    session.prefill(TOKENS[:7])
    session.step(int(TOKENS[7]))
    written = {value.data_ptr() for value in session._binding.get_outputs()}
    assert set(before.values()) <= written and len(before) == 2 * INTERFACE.layers
    for name, cache in session.caches().items():
        assert cache.ctypes.data == before[name]
        assert (cache[:, :, :8] != 0).any(axis=(0, 1, 3)).all() and (cache[:, :, 8:] == 0).all(), name


def test_two_buffers_for_past_and_present_fail_the_artifact(sidecar, monkeypatch):
    def bind_apart(self, binding):
        for name, (_, value) in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_output(f"present.{name}", "cpu")

    monkeypatch.setattr(OnnxSession, "_bind_caches", bind_apart)
    with pytest.raises(ArtifactFailure, match="toy: present.0.key is not the buffer of its past"):
        open_session(sidecar, "onnxruntime").prefill(TOKENS[:7])


def test_nothing_is_copied_of_a_prompts_logits_but_the_last_row(sidecar):
    """A prompt's logits may be 100 MB: they are not kept, and steps write into one row."""
    session = open_session(sidecar, "onnxruntime")
    row = session.prefill(TOKENS[:9])
    assert row.base is None and row.shape == (VOCABULARY,)
    steps = [session.step(int(token)) for token in TOKENS[9:12]]
    assert len({step.ctypes.data for step in steps}) == 1
    assert not np.shares_memory(row, steps[0])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_prompt_in_chunks_is_the_whole_prompt_in_bounded_memory(sidecar, monkeypatch, rows):
    """No call is given more tokens than the bound says, and the answers are those of one call and of single steps."""
    whole, stepped = (open_session(sidecar, "onnxruntime") for _ in range(2))
    expected = whole.prefill(TOKENS[:29])
    for token in TOKENS[:29]:
        one_by_one = stepped.step(int(token))
    monkeypatch.setattr(onnx_session, "PROMPT_LOGITS_BYTES", 4 * VOCABULARY * rows)
    chunked = open_session(sidecar, "onnxruntime")
    seen, run = [], chunked._run
    monkeypatch.setattr(chunked, "_run", lambda ids, logits: (seen.append(logits.nbytes), run(ids, logits)))
    np.testing.assert_allclose(chunked.prefill(TOKENS[:29]), expected, atol=1e-5)
    assert max(seen) <= 4 * VOCABULARY * rows and len(seen) == -(-29 // rows)
    np.testing.assert_allclose(one_by_one, expected, atol=1e-5)
    for token in TOKENS[29:33]:
        np.testing.assert_allclose(chunked.step(int(token)), whole.step(int(token)), atol=1e-5)


def test_a_cache_of_a_type_that_no_host_knows_is_named(sidecar, tmp_path):
    model = onnx.load(sidecar.with_suffix(".onnx"))
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]:
        position, pasts, presents = list(model.graph.node).index(node), list(node.input[3:5]), list(node.output[1:3])
        for index, name in enumerate(pasts):
            node.input[3 + index] = f"{name}.float"
            model.graph.node.insert(position, onnx.helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT))
        for index, name in enumerate(presents):
            node.output[1 + index] = f"{name}.float"
            model.graph.node.append(onnx.helper.make_node("Cast", [f"{name}.float"], [name], to=TensorProto.FLOAT16))
    onnx.save(model, tmp_path / "half.onnx")
    assert len(cache_names(INTERFACE)) == 4
    with pytest.raises(ArtifactFailure, match=r"half: a KV cache of tensor\(float16\); known are tensor\(float\), tensor\(int8\)"):
        open_session(write_sidecar(tmp_path / "half.onnx", "onnx"), "onnxruntime")


def test_the_program_keeps_packed_weights_in_a_folder(sidecar, tmp_path):
    """Twice: the folder is made by the first run and used by the second, with the same verdict."""
    golden, packed = tmp_path / "golden", tmp_path / "packed"
    golden.mkdir()
    write_vectors(golden, ToyModel(0), ToyModel(1))
    (tmp_path / "gates.json").write_text('{"top1": 1.0, "max_abs_diff": 1e-4}')
    found = []
    for _ in range(2):
        given = ["--artifact", str(sidecar), "--golden", str(golden), "--runtime", "onnxruntime", "--decode-tokens", "4"]
        files = ["--gates", str(tmp_path / "gates.json"), "--out", str(tmp_path / "out.json"), "--packed", str(packed)]
        assert main(given + files) == 0
        found.append([path.name for path in packed.iterdir()])
        result = json.loads((tmp_path / "out.json").read_text())["device"]
        assert result["passed"] and result["load_cold_ms"] is None  # the artifact's own files are not what is loaded
    assert found[0] == found[1] and len(found[0]) == 1
