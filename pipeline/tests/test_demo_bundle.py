"""The bundle of the demo model that `make android-bundle` has made: small enough, whole, and opened by other people's runtimes."""

import pytest

from pipeline.bundle import AIM, bundle_at
from pipeline.manifest import FORMAT_VERSION, Manifest
from pipeline.recipe import ROOT
from pipeline.tests.other_runtimes import GENAI, OPTIMUM, check_same, said_by, said_by_ours
from pipeline.verify import verify_bundle

FOLDER = ROOT / "dist" / "demo-android-bundle"
TOKENS = 48


@pytest.fixture(scope="module")
def bundle():
    """The default bundle; skips where the newest one was made by older code or as somebody asked for it."""
    archive = FOLDER.with_suffix(".zip")
    if not archive.is_file() or f'"format_version": {FORMAT_VERSION}' not in (FOLDER / "manifest.json").read_text():
        pytest.skip("no demo bundle of this version; run: make android-bundle")
    found = Manifest.model_validate_json((FOLDER / "manifest.json").read_bytes())
    forms = [path for artifact in found.artifacts for path in (artifact.ort_file, artifact.litert_lm_file) if path]
    if found.provenance.variants is not None or forms:
        pytest.skip("the demo bundle is not the default one; run: make android-bundle")
    return bundle_at(FOLDER, archive), found


def test_zip_is_at_most_60_percent_of_the_exported_model_s_fp32_weights_with_everything_in_it(bundle):
    built, manifest = bundle
    assert built.archive_bytes <= AIM * manifest.fp32_bytes, f"{built.share:.1%}"
    folders = {file.path.split("/")[0] for file in manifest.files if "/" in file.path}
    assert {"onnx", "litert", "tokenizer", "golden", "device_tests", "android", "python"} <= folders
    assert verify_bundle(built.archive, replay=False).passed


def test_the_hybrid_is_what_onnx_runtime_gets(bundle):
    _, manifest = bundle
    assert [artifact.name for artifact in manifest.artifacts] == ["onnx_hybrid_int8", "tflite_static_int8"]


@pytest.mark.parametrize("runtime", [GENAI, OPTIMUM], ids=["onnxruntime-genai", "optimum"])
def test_other_runtimes_open_it_unchanged_and_say_the_same(bundle, runtime):
    _, manifest = bundle
    artifact = next(entry for entry in manifest.artifacts if entry.file == "onnx/model.onnx")
    ours = said_by_ours(FOLDER, artifact, "onnxruntime", TOKENS)
    check_same(said_by(runtime, FOLDER / "onnx", TOKENS), ours, artifact.interface.eos_token_id)
