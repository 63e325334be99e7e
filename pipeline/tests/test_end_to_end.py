"""The whole road through the real command line: a random Qwen3 with texts, a random GPT-2 without any."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conftest import CONTEXT
from device_tests.devices import WORK
from models.checkpoint import load_model, load_tokenizer
from pipeline import fingerprint
from pipeline.manifest import Artifact, Manifest
from pipeline.runner import with_our_path
from pipeline.tests.other_runtimes import GENAI, LITERT_LM, OPTIMUM, check_same, said_by, said_by_ours
from pipeline.tests.test_signing import KEY, pem

pytest_plugins = ["pipeline.tests.kotlin_fixtures"]

SMALL = {
    "text.window_tokens": 64, "text.prompt_tokens": 16, "text.calibration_windows": 8, "text.evaluation_windows": 4,
    "text.sampled_recovery_tokens": 2048, "prune.ffn": 0.25, "prune.windows": 4, "recover.steps": 4, "recover.batch_windows": 4,
    "recover.window_tokens": 64, "smooth.windows": 4, "golden.windows": 2, "golden.scored_tokens": 16, "golden.greedy_tokens": 16,
    "onnx.greedy_tokens": 16, "onnx_int8.windows": 4, "onnx_int8.decode_steps": 4, "tflite.prefill_tokens": 16,
    "tflite_int8.windows": 4, "tflite_int8.decode_steps": 4, "tokenizer.random_documents": 20, "device.rounds": 2,
    "device.emulated_windows": 1,
    # A random model has no favourite token, so a trained model's limits on int8 would judge chance.
    "gates.onnx_static_int8.top1": 0.5, "gates.onnx_static_int8.perplexity_change": 0.2,
    "gates.onnx_weight_only_int8.perplexity_change": 0.2, "gates.onnx_weight_only_int4.perplexity_change": 0.5,
    "gates.onnx_hybrid_int8.perplexity_change": 0.2, "gates.onnx_hybrid_int4.perplexity_change": 0.5,
    "onnx_hybrid_int8.windows": 4, "onnx_hybrid_int8.decode_steps": 4, "onnx_hybrid_int4.windows": 4, "onnx_hybrid_int4.decode_steps": 4,
    "gates.tflite_static_int8.top1": 0.5, "gates.tflite_static_int8.perplexity_change": 0.2,
}  # fmt: skip
# The road with a text also goes by single weights and through the artifacts that are made on demand.
BESIDE = {"prune.method": "sparsegpt", "prune.sparsity": 0.3, "cluster.centroids": 200}
ON_DEMAND = ("onnx_dynamic_int8", "onnx_weight_only_int8", "onnx_weight_only_int4", "onnx_hybrid_int4")
ON_DEMAND += ("tflite_dynamic_int8", "tflite_weight_only_int8")
RUNTIMES = {"onnx_fp32": {"onnxruntime"}, "onnx_static_int8": {"onnxruntime"}, "onnx_hybrid_int8": {"onnxruntime"}}
RUNTIMES |= {"tflite_fp32": {"litert", "tflite"}, "tflite_static_int8": {"litert", "tflite"}}


EVERYTHING = ("--variants", "all")


@dataclass(frozen=True)
class Place:
    """A folder in which a person works, with a checkpoint and perhaps texts."""

    folder: Path
    options: tuple[str, ...]

    def pocketlm(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = with_our_path({**os.environ, "HF_HUB_OFFLINE": "1"})
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def bundle(self, *more: str) -> dict:
        done = self.pocketlm("bundle", *self.options, *more, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def built(request, checkpoints, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--model", str(checkpoints[request.param])]
    options += [f"--set={key}={value}" for key, value in SMALL.items()]
    if request.param == "qwen3":
        held_out = folder / "held-out.txt"
        held_out.write_text(Path(fingerprint.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        options += ["--calibration", str(text_file), "--evaluation", str(held_out)]
        options += [f"--set={key}={value}" for key, value in BESIDE.items()]
        options += [f"--set=artifacts={json.dumps([*RUNTIMES, *ON_DEMAND])}", '--set=device.devices=["local"]']
    lab = fingerprint.ROOT / WORK / "arm64-lab"  # built once for all, and kept
    lab.mkdir(parents=True, exist_ok=True)
    (folder / WORK).mkdir()
    (folder / WORK / "arm64-lab").symlink_to(lab)
    place = Place(folder, tuple(options))
    return request.param, place, place.bundle(*EVERYTHING)


def test_every_artifact_passed_in_every_runtime(built):
    family, place, said = built
    report = said["report"]
    assert report["passed"] and not said["up_to_date"]
    ran = {artifact["name"]: {device["runtime"] for device in artifact["devices"]} for artifact in report["artifacts"]}
    assert ran.keys() == RUNTIMES.keys() | (set(ON_DEMAND) if family == "qwen3" else set())
    assert {name: ran[name] for name in RUNTIMES} == RUNTIMES and all(ran.values())
    assert report["text_sampled"] == (family == "gpt2")
    assert report["pruned"]["parameters"] < report["model"]["parameters"]
    met = {device["device"]: device for artifact in report["artifacts"] for device in artifact["devices"]}
    arm64 = [name for name in met if name.startswith("arm64")]
    assert (family == "gpt2") == bool(arm64) or report["skipped"], "every bundle meets ARM64 unless its recipe says otherwise"
    assert all(met[name]["isa"] == "aarch64" and met[name]["against_local"]["top1"] > 0.9 for name in arm64)
    for artifact in report["artifacts"]:
        sidecar = next((place.folder / said["folder"]).rglob(f"{artifact['name']}.json"))
        files = [sidecar.parent / file["path"] for file in json.loads(sidecar.read_text())["files"]]
        assert artifact["bytes"] == sum(file.stat().st_size for file in files)
        if artifact["name"].endswith("fp32"):
            assert artifact["quality"]["top1"] == 1.0 and all(device["max_abs_diff"] <= 5e-5 for device in artifact["devices"])


def test_a_second_run_measures_nothing_and_changes_nothing(built):
    _, place, said = built
    archive = place.folder / said["zip"]
    before = archive.read_bytes()
    again = place.bundle(*EVERYTHING)
    assert again["up_to_date"] and not again["measured"] and again["report"] == said["report"] and archive.read_bytes() == before


def test_pytorch_and_all_three_runtimes_write_the_same_greedy_text(built, checkpoints):
    _, place, said = built
    artifacts = {"onnx": "onnx_fp32", "litert": "tflite_fp32", "tflite": "tflite_fp32"}
    texts = {runtime: greedy_text(place, said, runtime, artifact) for runtime, artifact in artifacts.items()}
    model_folder = next((place.folder / ".pocketlm" / "cluster").glob("*/model.safetensors")).parent
    assert texts["onnx"] == texts["litert"] == texts["tflite"] == pytorch_text(model_folder, "def tiny", 12)


def pytorch_text(folder: Path, prompt: str, tokens: int) -> str:
    """Greedy continuation by recomputing the whole text at every step: no cache that could lie."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.inference_mode():
            following = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
        if following.item() == model.config.eos_token_id:
            break
        ids = torch.cat([ids, following], dim=1)
    assert ids.shape[1] <= CONTEXT
    whole, given = (tokenizer.decode(row, skip_special_tokens=False) for row in (ids[0], ids[0, :start]))
    return whole[len(given) :]


def test_the_kotlin_library_writes_what_generate_writes(built, onnx_library):
    """From the bundle's folder alone, in ONNX Runtime's Java API."""
    _, place, said = built
    run = {"prompt": "def tiny", "max_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    for artifact in ("onnx_fp32", "onnx_static_int8", "onnx_hybrid_int8"):
        written = onnx_library.ask("generate", folder=str(place.folder / said["folder"]), artifact=artifact, runs=[run])[0]
        assert written["text"] == greedy_text(place, said, "onnx", artifact), artifact


def test_the_example_for_a_board_writes_what_generate_writes(built, tmp_path):
    _, place, said = built
    program = place.folder / said["folder"] / "python" / "generate.py"
    for runtime, artifact in (("onnx", "onnx_fp32"), ("litert", "tflite_fp32")):
        command = [sys.executable, "-I", str(program), "def tiny", "--artifact", artifact, "--max-tokens", "12", "--threads", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == greedy_text(place, said, runtime, artifact) + "\n"


def greedy_text(place: Place, said: dict, runtime: str, artifact: str) -> str:
    """What `pocketlm generate` makes of the same prompt."""
    command = [
        "generate",
        said["folder"],
        "--runtime",
        runtime,
        "--artifact",
        artifact,
        "--prompt",
        "def tiny",
        "--max-tokens",
        "12",
        "--json",
    ]
    done = place.pocketlm(*command)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["text"]


def test_verify_accepts_the_zip_and_names_a_changed_byte(built):
    _, place, said = built
    good = place.pocketlm("verify", said["zip"], "--json")
    assert good.returncode == 0, good.stderr
    devices = [device for artifact in said["report"]["artifacts"] for device in artifact["devices"]]
    assert len(json.loads(good.stdout)["replays"]) == sum(device["device"] == "local" for device in devices)
    folder = place.folder / said["folder"]
    named = json.loads((folder / "onnx/onnx_static_int8.json").read_text())["file"]
    victim = folder / "onnx" / named
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    bad = place.pocketlm("verify", said["folder"])
    victim.write_bytes(whole)
    assert bad.returncode == 1 and f"onnx/{named}: changed" in bad.stderr


def test_a_missed_gate_is_exit_code_1_and_the_old_bundle_stays(built):
    _, place, said = built
    before = (place.folder / said["zip"]).read_bytes()
    done = place.pocketlm("bundle", *place.options, *EVERYTHING, "--set=gates.onnx_static_int8.kl=1e-12", '--set=device.devices=["local"]')
    assert done.returncode == 1, done.stderr
    for word in ("kl ", "exceeds 1e-12", "onnx_static_int8", "worst"):
        assert word in done.stderr
    assert (place.folder / said["zip"]).read_bytes() == before


@pytest.mark.parametrize("runtime", [GENAI, OPTIMUM], ids=["onnxruntime-genai", "optimum"])
def test_other_runtimes_open_the_bundle_unchanged_and_say_the_same(built, runtime):
    _, place, said = built
    folder = place.folder / said["folder"]
    artifact = artifact_of(folder, "onnx/model.onnx")
    ours = said_by_ours(folder, artifact, "onnxruntime", 12)
    check_same(said_by(runtime, folder / "onnx", 12), ours, artifact.interface.eos_token_id)


def test_another_choice_signed_and_in_parts_is_written_from_the_same_measurement(built, tmp_path):
    """The default bundle, with the files for other hosts; then all artifacts again, the same bytes as before."""
    _, place, said = built
    archive = place.folder / said["zip"]
    before = archive.read_bytes()
    key, public = pem(KEY, tmp_path / "key.pem")
    made = place.bundle("--sign", str(key), "--split-mb", "0.2", "--litert-lm")
    assert not made["measured"] and not made["up_to_date"] and made["report"] == said["report"]
    formats = [name.split("_")[0] for name in made["artifacts"]]
    assert formats == ["onnx", "tflite"] and len(made["parts"]) > 1 and made["share_of_fp32"] > 0
    folder = place.folder / made["folder"]
    assert len(list(folder.glob("onnx/*.onnx"))) <= 4 and list(folder.glob("litert/*.tflite")) == [folder / "litert/model.tflite"]
    checked = place.pocketlm("verify", made["parts"][0], "--key", str(public), "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["signature"] == "checked"
    ours = said_by_ours(folder, artifact_of(folder, "litert/model.tflite"), "litert", 12)
    check_same(said_by(LITERT_LM, folder / "litert/model.litertlm", 12), ours, None)
    again = place.bundle(*EVERYTHING)
    assert not again["measured"] and archive.read_bytes() == before and not list(archive.parent.glob("*.zip.0*"))
    unsigned = place.pocketlm("verify", again["zip"], "--key", str(public))
    assert unsigned.returncode == 1 and "SHA256SUMS.sig: missing" in unsigned.stderr


def artifact_of(folder: Path, file: str) -> Artifact:
    """The artifact of a bundle that has this file."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    return next(entry for entry in manifest.artifacts if entry.file == file)


def test_plan_says_what_a_changed_setting_would_run(built):
    _, place, _ = built
    planned = json.loads(place.pocketlm("plan", *place.options, "--set=smooth.alpha=0.7", "--json").stdout)["stages"]
    reasons = {stage["stage"]: stage["reasons"] for stage in planned}
    assert reasons["prune"] == reasons["recover"] == [] and reasons["smooth"] == ["settings.alpha: 0.5 -> 0.7"]
    assert reasons["onnx"] and reasons["tflite_int8"] and reasons["tokenizer"] == []
