"""The Kotlin library opens real artifacts, in ONNX Runtime's own Java API and in LiteRT, and says what Python says."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from device_tests.artifact import read_artifact
from device_tests.gates import Gates, judge
from device_tests.replay import replay
from device_tests.sampling import Sampling, next_token
from device_tests.sessions import open_session
from device_tests.vectors import open_golden
from pipeline.tests.phone_folder import GATES, INT8_CACHE, write_onnx_phone, write_tflite_phone

pytest_plugins = ["pipeline.tests.kotlin_fixtures"]

ONNX = ["onnx_fp32", "onnx_hybrid_int8", INT8_CACHE, "onnx_hybrid_int4"]
EVERY = [*ONNX, "tflite_fp32"]
LENGTHS = [(artifact, length) for artifact in ONNX for length in (1, 7, 8, 9, 33, 128, 129, 137, 257)]  # of prompts, in tokens
LENGTHS += [("tflite_fp32", length) for length in (1, 4, 5, 16, 17, 33)]
RUN = {"max_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
PROMPT = "def tiny_text() -> str:\n    "


@pytest.fixture(scope="module")
def onnx_phone(tmp_path_factory) -> Path:
    return write_onnx_phone(tmp_path_factory.mktemp("phone"))


@pytest.fixture(scope="module")
def tflite_phone(tmp_path_factory) -> Path:
    return write_tflite_phone(tmp_path_factory.mktemp("phone"))


@pytest.fixture
def phone(request, artifact) -> Path:
    return request.getfixturevalue("tflite_phone" if artifact.startswith("tflite") else "onnx_phone")


@pytest.fixture
def library(request, artifact):
    return request.getfixturevalue("litert_library" if artifact.startswith("tflite") else "onnx_library")


def sidecar_of(phone: Path, artifact: str) -> Path:
    entries = json.loads((phone / "manifest.json").read_text())["artifacts"]
    return phone / next(entry["sidecar"] for entry in entries if entry["name"] == artifact)


def session_of(phone: Path, artifact: str):
    return open_session(sidecar_of(phone, artifact), "litert" if artifact.startswith("tflite") else "onnxruntime")


def continued(phone: Path, artifact: str, ids: list[int], run: dict) -> list[int]:
    """The tokens that Python's loop makes."""
    session, generator = session_of(phone, artifact), np.random.default_rng(run["seed"])
    sampling, found = Sampling(run["temperature"], run["top_k"], run["top_p"]), []
    logits = session.prefill(np.array(ids))
    while True:
        token = next_token(logits, sampling, generator)
        if token == session.interface.eos_token_id:
            return found
        found.append(token)
        if len(found) == run["max_tokens"] or len(ids) + len(found) > session.interface.context_tokens:
            return found
        logits = session.step(token)


@pytest.mark.parametrize("artifact", EVERY)
def test_golden_replay_is_pythons(library, phone, artifact):
    golden = open_golden(phone / "golden", read_artifact(sidecar_of(phone, artifact)).interface)
    ours = replay(session_of(phone, artifact), golden)
    found = library.ask("replay", folder=str(phone), artifact=artifact, golden=str(phone / "golden/golden.npz"))
    assert found["tokens"] == ours.tokens and found["top1"] == pytest.approx(ours.top1)
    assert found["max_abs_diff"] == pytest.approx(ours.max_abs_diff, rel=1e-3) and found["worst"] == str(ours.worst)
    assert found["kl"] == pytest.approx(ours.kl.value, rel=1e-3, abs=1e-9)
    assert found["kl_stderr"] == pytest.approx(ours.kl.stderr, rel=1e-3, abs=1e-9)
    assert (found["greedy_prefix"], found["greedy_tokens"]) == (ours.greedy_prefix, ours.greedy_tokens)
    assert bool(found["failures"]) == bool(judge(Gates(**GATES), ours, None))


@pytest.mark.parametrize(("artifact", "length"), LENGTHS)
def test_prompts_of_every_length_go_on_as_in_python(library, phone, artifact, length):
    """Shorter and longer than a hybrid's short prompt, and than one and two calls of each kind."""
    ids = np.random.default_rng(length).integers(1, 384, length).tolist()
    for run in (RUN, {**RUN, "temperature": 1.3, "top_k": 50, "top_p": 0.9, "seed": 11}):
        found = library.ask("generate", folder=str(phone), artifact=artifact, runs=[{**run, "ids": ids}])[0]
        assert found["ids"] == continued(phone, artifact, ids, run) and found["new_tokens"] == len(found["ids"]) and found["timed"]


@pytest.mark.parametrize("artifact", ["onnx_hybrid_int8", "tflite_fp32"])
def test_text_comes_out_as_the_tokenizer_has_it(library, phone, artifact):
    tokenizer = Tokenizer.from_file(str(phone / "tokenizer/tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    runs = [{**RUN, "prompt": PROMPT}, {**RUN, "prompt": PROMPT, "temperature": 1.0, "seed": 4}, {**RUN, "prompt": ""}]
    found = library.ask("generate", folder=str(phone), artifact=artifact, runs=runs)
    for run, answer in zip(runs, found, strict=True):
        wanted = continued(phone, artifact, ids if run["prompt"] else [0], run)
        assert answer["ids"] == wanted and answer["text"] == tokenizer.decode(wanted, skip_special_tokens=False)
        assert answer["ended"] == ("MAX_TOKENS" if len(wanted) == 12 else "END_OF_TEXT")


@pytest.mark.parametrize("artifact", ["onnx_fp32"])
def test_stops_end_a_text(library, phone, artifact):
    tokenizer = Tokenizer.from_file(str(phone / "tokenizer/tokenizer.json"))
    free = library.ask("generate", folder=str(phone), artifact=artifact, runs=[{**RUN, "prompt": PROMPT}])[0]
    third = tokenizer.decode(free["ids"][2:3], skip_special_tokens=False)
    asked = [{**RUN, "prompt": PROMPT, "stop": [third]}, {**RUN, "prompt": PROMPT, "stop_ids": [free["ids"][2]]}]
    by_text, by_id = library.ask("generate", folder=str(phone), artifact=artifact, runs=asked)
    assert by_text["ended"] == "STOP" and by_text["text"] == free["text"][: free["text"].index(third)]
    assert by_id["ended"] == "END_OF_TEXT" and by_id["ids"] == free["ids"][: free["ids"].index(free["ids"][2])]


@pytest.mark.parametrize("artifact", ["onnx_hybrid_int8", "tflite_fp32"])
def test_the_context_is_filled_and_not_overrun(library, phone, artifact):
    context = session_of(phone, artifact).interface.context_tokens
    ids = [5] * (context - 3)
    full, over = library.ask(
        "generate", folder=str(phone), artifact=artifact, runs=[{**RUN, "ids": ids, "stop_ids": []}, {**RUN, "ids": [5] * context}]
    )
    assert full["ended"] == "CONTEXT_FULL" and full["new_tokens"] == 4
    assert f"the prompt has {context} tokens but the context holds {context}" in over["refused"]


@pytest.mark.parametrize("artifact", ["onnx_hybrid_int8", "tflite_fp32"])
def test_ids_outside_the_vocabulary_are_refused(library, phone, artifact):
    runs = [{**RUN, "ids": [3, 384]}, {**RUN, "ids": [-1]}, {**RUN, "ids": []}]
    found = library.ask("generate", folder=str(phone), artifact=artifact, runs=runs)
    assert [answer["refused"].split(";")[0] for answer in found] == [
        "token id 384, the model has 384",
        "token id -1, the model has 384",
        "an empty prompt",
    ]


@pytest.mark.parametrize("artifact", ["onnx_fp32", "tflite_fp32"])
def test_a_flow_ends_when_it_should(library, phone, artifact):
    run = {**RUN, "max_tokens": 20, "ids": [7, 8, 9]}
    whole = library.ask("generate", folder=str(phone), artifact=artifact, runs=[run])[0]["ids"]
    found = library.ask("flow", folder=str(phone), artifact=artifact, run=run, golden=str(phone / "golden/golden.npz"))
    assert found["taken"] == whole[:3], "take(3)"
    assert found["cancelled"][:4] == whole[:4] and len(found["cancelled"]) in (4, 5) and found["ended"] == "CANCELLED"
    assert found["left"] == 2 and found["thrown"], "a collector that throws CancellationException"
    assert found["together"] == [whole] * 3, "three at once take turns"
    assert found["beside"] == whole, "a replay waits its turn too"
    assert found["closed"] == "the model is closed"


@pytest.mark.parametrize("artifact", ["onnx_hybrid_int8", "tflite_fp32"])
def test_a_changed_file_is_not_opened(library, phone, artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(phone, copy)
    sidecar = sidecar_of(copy, artifact)
    names = [file["path"] for file in json.loads(sidecar.read_text())["files"]]
    for path in (
        sidecar,
        *(sidecar.parent / name for name in names),
        copy / "tokenizer/tokenizer.json",
        copy / "tokenizer/text_rules.json",
    ):
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        refused = library.ask("open", folder=str(copy), artifact=artifact)["refused"]
        assert refused.startswith(f"{path.relative_to(copy).as_posix()}: changed"), path.name
        path.write_bytes(before)
    assert library.ask("open", folder=str(copy), artifact=artifact) == artifact


@pytest.mark.parametrize("artifact", ["onnx_fp32"])
def test_an_app_takes_only_its_own_manifest(library, phone, artifact):
    own = hashlib.sha256((phone / "manifest.json").read_bytes()).hexdigest()
    assert library.ask("open", folder=str(phone), artifact=artifact, manifest_sha256=own) == artifact
    refused = library.ask("open", folder=str(phone), artifact=artifact, manifest_sha256="0" * 64)["refused"]
    assert refused == f"manifest.json: SHA-256 {own}, this app was built with {'0' * 64}"


@pytest.mark.parametrize("artifact", ["onnx_fp32", "tflite_fp32"])
def test_the_model_that_is_meant_must_be_clear_and_of_this_runtime(library, phone, artifact, tmp_path):
    asked = library.ask("open", folder=str(phone))  # without a name: the only one, or none of several
    assert asked == artifact if artifact.startswith("tflite") else "several models" in asked["refused"]
    assert "no artifact nonsense" in library.ask("open", folder=str(phone), artifact="nonsense")["refused"]
    copy = changed_manifest(phone, tmp_path, lambda entry: entry.update(format={"onnx": "tflite", "tflite": "onnx"}[entry["format"]]))
    for entry in json.loads((copy / "manifest.json").read_text())["artifacts"]:
        assert "take the bundle again" in library.ask("open", folder=str(copy), artifact=entry["name"])["refused"]


@pytest.mark.parametrize("artifact", ["onnx_fp32", "tflite_fp32"])
def test_a_manifest_that_describes_another_model_is_refused(library, phone, artifact, tmp_path):
    copy = changed_manifest(phone, tmp_path, lambda entry: entry["interface"].update(layers=entry["interface"]["layers"] + 1))
    refused = library.ask("open", folder=str(copy), artifact=artifact)["refused"]
    assert "inputs" in refused and "take the bundle again" in refused


def changed_manifest(phone: Path, target: Path, change) -> Path:
    """A copy of the folder, whose manifest ``change`` has made another one of."""
    copy = target / "copy"
    shutil.copytree(phone, copy)
    record = json.loads((copy / "manifest.json").read_text())
    for entry in record["artifacts"]:
        change(entry)
    (copy / "manifest.json").write_text(json.dumps(record))
    return copy


@pytest.mark.parametrize("artifact", ["onnx_fp32"])
def test_foreign_golden_vectors_are_refused(library, phone, artifact, tmp_path):
    with np.load(phone / "golden/golden.npz") as golden:
        np.savez(tmp_path / "golden.npz", **{**golden, "logits": golden["logits"][..., :-1].copy()})
    refused = library.ask("replay", folder=str(phone), artifact=artifact, golden=str(tmp_path / "golden.npz"))["refused"]
    assert "383 logits, the model 384" in refused
