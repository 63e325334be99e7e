"""Prompts of every length through the session that hosts use, in both runtimes, against PyTorch; and what the session needs for it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import compiled_model
from ai_edge_litert import interpreter as litert
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CONTEXT, VOCABULARY
from device_tests import tflite_session
from device_tests.artifact import read_artifact
from device_tests.tflite_compiled import CompiledCalls, CompiledUnavailable
from exporters import tflite_export, tflite_int8
from exporters.settings import TfliteInt8Settings, TfliteSettings
from models.checkpoint import load_model

LENGTHS = (3, 16, 40)
CLOSE = 1e-4
ROOT = Path(tflite_export.__file__).parents[1]
TEXT = np.random.default_rng(11).integers(0, VOCABULARY, CONTEXT).astype(np.int64)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lengths_text")
    for seed, name in enumerate(("calibration", "validation")):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, VOCABULARY, (4, 100)).astype(np.int32))
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request, tmp_path_factory, text_folder, checkpoints) -> Path:
    folder = tmp_path_factory.mktemp(f"lengths_{request.param}")
    chosen = TfliteSettings(prefill_tokens=LENGTHS, context_tokens=CONTEXT)
    tflite_export.run(chosen, folder, model=checkpoints[request.param], text=text_folder)
    (folder / "family").write_text(request.param)
    return folder


@pytest.fixture(scope="module")
def expected(exported, checkpoints) -> np.ndarray:
    """PyTorch's logits [CONTEXT, vocab] after each token of ``TEXT``."""
    model = load_model(checkpoints[(exported / "family").read_text()])
    with torch.no_grad():
        return model(torch.from_numpy(TEXT[None])).logits[0].numpy()


@pytest.fixture(scope="module")
def session(exported) -> tflite_session.TfliteSession:
    return tflite_session.open_model(read_artifact(exported / "tflite_fp32.json"), litert, threads=1)


def test_litert_shares_one_copy_of_the_weights_and_one_cache(session):
    """CompiledModel is in use, and what the host writes into the cache is what every signature reads."""
    assert isinstance(session._calls, CompiledCalls) and session.notes == []
    inputs = {name: session._calls._buffers["decode", "input", name] for name in ("k_0", "v_1")}
    assert len({id(buffer) for buffer in inputs.values()}) == 2
    assert not [key for key in session._calls._buffers if key[0] != "decode" and key[2] in inputs and key[1] == "input"]


def test_every_length_of_prompt_in_litert(session, expected):
    for length in range(1, CONTEXT + 1):
        session.reset()
        np.testing.assert_allclose(session.prefill(TEXT[:length]), expected[length - 1], atol=CLOSE, err_msg=f"{length} tokens")


def test_token_by_token_in_litert(session, expected):
    """To the end of the context, so the cache grows twice on the way."""
    session.reset()
    for place, token in enumerate(TEXT):
        np.testing.assert_allclose(session.step(int(token)), expected[place], atol=CLOSE, err_msg=f"token {place}")


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), steps=st.integers(0, 4), back=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_prompts_steps_and_rewinding_in_any_order(session, expected, lengths, steps, back):
    session.reset()
    for length in lengths:
        end = min(session.position + length, CONTEXT)
        if end > session.position:
            np.testing.assert_allclose(session.prefill(TEXT[session.position : end]), expected[end - 1], atol=CLOSE)
        session.rewind(max(0, session.position - back))
        for _ in range(min(steps, CONTEXT - session.position)):
            place = session.position
            np.testing.assert_allclose(session.step(int(TEXT[place])), expected[place], atol=CLOSE)


def test_every_length_of_prompt_in_tflite_runtime(exported, expected, tmp_path):
    """In a process of its own, as the two runtimes cannot live in one; also that XNNPACK is still in use at every length of the cache."""
    script = """
        import json, sys
        from pathlib import Path
        import numpy as np
        from device_tests.sessions import open_session
        session = open_session(Path(sys.argv[1]), sys.argv[4])
        text, rows = np.load(sys.argv[2]), []
        for length in range(1, len(text) + 1):
            session.reset()
            rows.append(session.prefill(text[:length]).copy())
        session.reset()
        steps = [session.step(int(token)).copy() for token in text]
        np.savez(sys.argv[3], prompts=rows, steps=steps, notes=np.array(session.notes, str))
    """
    np.save(tmp_path / "text.npy", TEXT)
    given = [str(exported / "tflite_fp32.json"), str(tmp_path / "text.npy"), str(tmp_path / "out.npz"), "tflite"]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *given], check=True, cwd=ROOT, capture_output=True)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["prompts"], expected, atol=CLOSE)
        np.testing.assert_allclose(found["steps"], expected, atol=CLOSE)
        assert found["notes"].tolist() == []


def test_without_compiled_model_the_interpreter_is_used_and_the_record_says_so(exported, expected, monkeypatch):
    def refuse(*_):
        raise CompiledUnavailable("its package has no C API")

    monkeypatch.setattr(tflite_session, "CompiledCalls", refuse)
    session = tflite_session.open_model(read_artifact(exported / "tflite_fp32.json"), litert, threads=1)
    assert session.notes == ["LiteRT's Interpreter is used, which packs the weights once for each signature: its package has no C API"]
    for length in (1, 17, 64, 65, CONTEXT):
        session.reset()
        np.testing.assert_allclose(session.prefill(TEXT[:length]), expected[length - 1], atol=CLOSE)


def test_addresses_are_proved_before_they_are_used(exported, monkeypatch):
    """Memory that the runtime does not write to is found out, instead of answers that never change."""
    elsewhere = np.zeros(1 << 20, np.uint8)
    monkeypatch.setattr("device_tests.tflite_compiled.address_of", lambda package: lambda capsule: elsewhere.ctypes.data)
    with pytest.raises(CompiledUnavailable, match="do not lie where its C API says|Failed to invoke"):
        CompiledCalls(exported / "tflite_fp32.tflite", ["decode", "prefill_3"], 1, compiled_model)


def test_a_missing_signature_is_named(exported):
    with pytest.raises(ValueError, match="no signature prefill_5"):
        CompiledCalls(exported / "tflite_fp32.tflite", ["decode", "prefill_5"], 1, compiled_model)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no memory map to read")
def test_xnnpack_shows_in_the_memory_map(exported):
    """Packed weights are the sign of it: a CompiledModel with plain kernels has none, another one has."""
    script = """
        import sys
        from ai_edge_litert.compiled_model import CompiledModel, CpuKernelMode, CpuOptions, Options
        from device_tests.tflite_compiled import WEIGHT_CACHE, weights_are_packed
        plain = CpuOptions(kernel_mode=CpuKernelMode.BUILTIN, xnnpack_weight_cache_path=WEIGHT_CACHE)
        model = CompiledModel.from_file(sys.argv[1], options=Options(cpu_options=plain))
        before = weights_are_packed()
        other = CompiledModel.from_file(sys.argv[1], options=Options(cpu_options=CpuOptions(xnnpack_weight_cache_path=WEIGHT_CACHE)))
        print(before, weights_are_packed())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(exported / "tflite_fp32.tflite")]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]


def test_static_int8_with_the_weight_cache_computes_what_it_does_without(exported, text_folder, tmp_path):
    """XNNPACK's weight cache finds packed weights by the weight alone, whatever was folded into them; the file must leave it no choice."""
    tflite_int8.run(TfliteInt8Settings(windows=3, decode_steps=6), tmp_path, tflite=exported, text=text_folder)
    artifact = read_artifact(tmp_path / "tflite_static_int8.json")
    assert artifact.interface.resizable_cache and json.loads((tmp_path / "tflite_static_int8.json").read_text())["measured"]["coverage"]
    shared = tflite_session.open_model(artifact, litert, threads=1)
    alone = tflite_session.open_interpreter(artifact, litert, threads=1)
    assert isinstance(shared._calls, CompiledCalls) and not isinstance(alone._calls, CompiledCalls)
    for length in (2, 16, 45, 100):
        for one in (shared, alone):
            one.reset()
        np.testing.assert_array_equal(shared.prefill(TEXT[:length]), alone.prefill(TEXT[:length]), err_msg=f"{length} tokens")
        np.testing.assert_array_equal(shared.step(5), alone.step(5))
