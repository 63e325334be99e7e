"""The bundle: what is in it, that only what passed gets in, that it is whole or absent, and the same bytes again."""

import dataclasses
import errno
import hashlib
import json
import os
import zipfile
from pathlib import Path

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import GateError, UserError
from pipeline import bundle as bundling
from pipeline.bundle import AIM, build_bundle, size_line
from pipeline.bundle_files import BundleInputs, BundleOptions
from pipeline.bundle_kept import as_asked, kept_bundle
from pipeline.manifest import FORMAT_VERSION, Manifest, sums
from pipeline.recipe import load_recipe
from pipeline.report import Report, build_report
from pipeline.tests.fake_road import BEST, EVERYTHING, fake_outcome, fake_recipe, fake_road, fake_stages
from pipeline.write_schemas import FOLDER
from pipeline.zip_folder import write_zip


@pytest.fixture
def road(tmp_path):
    return fake_road(tmp_path / "road")


def build(road, out, worse=None, options=EVERYTHING):
    report = build_report(fake_recipe(), road, fake_outcome(road, worse), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key", options), out)


def manifest_of(folder) -> Manifest:
    return Manifest.model_validate_json((folder / "manifest.json").read_text(encoding="utf-8"))


def tree(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundle_holds_what_its_manifest_says(road, tmp_path):
    built = build(road, tmp_path / "dist")
    assert built.folder.name == "tiny-android-bundle" and built.archive.name == "tiny-android-bundle.zip"
    files, manifest = tree(built.folder), manifest_of(built.folder)
    assert {file.path for file in manifest.files} == files.keys() - {"manifest.json", "SHA256SUMS"}
    for file in manifest.files:
        assert hashlib.sha256(files[file.path]).hexdigest() == file.sha256 and len(files[file.path]) == file.bytes
    expected = {"onnx/model.onnx", "onnx/onnx_fp32.onnx", "litert/model.tflite", "litert/tflite_fp32.tflite", "golden/golden.npz"}
    expected |= {"device_tests/__main__.py", "recipe.toml", "report.json", "report.html", "LICENSE", "NOTICE", "README.md"}
    expected |= {"MODEL_CARD.md", "sbom.cdx.json", "onnx/genai_config.json", "onnx/config.json", "onnx/required_operators.config"}
    expected |= {f"{folder}/tokenizer.json" for folder in ("tokenizer", "onnx", "litert")}
    assert expected <= files.keys()
    assert not any(name.endswith("stage.json") or "evaluation" in name or "tests/tests" in name for name in files)
    assert manifest.format_version == FORMAT_VERSION and len(manifest.artifacts) == 4
    assert files["SHA256SUMS"].decode() == sums(manifest, hashlib.sha256(files["manifest.json"]).hexdigest())
    assert {path.name for path in (tmp_path / "dist").iterdir()} == {
        ".tiny-android-bundle.lock",
        built.folder.name,
        built.archive.name,
    }


def test_manifest_keeps_to_its_schema(road, tmp_path):
    folder = build(road, tmp_path / "dist").folder
    schema = json.loads((FOLDER / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def test_without_a_choice_the_best_of_each_format_goes_in_and_all_are_reported(road, tmp_path):
    folder = build(road, tmp_path / "dist", options=BundleOptions()).folder
    manifest = manifest_of(folder)
    assert tuple(entry.name for entry in manifest.artifacts) == BEST and manifest.provenance.variants is None
    assert [entry.file for entry in manifest.artifacts] == ["onnx/model.onnx", "litert/model.tflite"]
    assert [entry.name for entry in manifest.left_out] == ["onnx_fp32", "tflite_fp32"]
    assert len(json.loads((folder / "report.json").read_text())["artifacts"]) == 4
    assert {path.name for path in (folder / "golden").glob("*.gates.json")} == {f"{name}.gates.json" for name in BEST}
    text = (folder / "README.md").read_text(encoding="utf-8")
    for entry in (*manifest.artifacts, *manifest.left_out):
        assert entry.why in text
    sidecar = json.loads((folder / "onnx/onnx_static_int8.json").read_text())
    assert sidecar["file"] == sidecar["files"][0]["path"] == "model.onnx"
    assert hashlib.sha256((folder / "onnx/model.onnx").read_bytes()).hexdigest() == sidecar["sha256"] == manifest.artifacts[0].sha256
    assert json.loads((folder / "onnx/genai_config.json").read_text())["model"]["decoder"]["filename"] == "model.onnx"


@pytest.mark.parametrize(
    ("artifacts", "told", "untold"),
    [(["onnx_fp32"], "`onnx/model.onnx`", "litert/"), (["tflite_static_int8"], "`litert/model.tflite`", "#### ONNX Runtime")],
)
def test_a_bundle_of_some_artifacts_holds_and_explains_those(artifacts, told, untold, road, tmp_path):
    folder = build(road, tmp_path / "dist", options=BundleOptions(variants=tuple(artifacts))).folder
    manifest = manifest_of(folder)
    assert [entry.name for entry in manifest.artifacts] == manifest.provenance.variants == artifacts
    assert len(manifest.left_out) == 3 and all("not asked for" in entry.why for entry in manifest.left_out)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert told in text and untold not in text
    assert (folder / manifest.tokenizer.encode_graph).is_file() and (folder / told.strip("`")).is_file()


def test_a_recipe_of_one_artifact_makes_a_bundle_of_it(road, tmp_path):
    recipe = load_recipe(None, ['name="tiny"', 'artifacts=["onnx_fp32"]'])
    report = build_report(recipe, road, fake_outcome(road), fake_stages())
    built = build_bundle(BundleInputs(recipe, road, report, "key"), tmp_path / "dist")
    (entry,) = manifest_of(built.folder).artifacts
    assert entry.name == "onnx_fp32" and "the only one of its format" in entry.why


def test_manifest_says_how_to_call_and_where_it_was_proved(road, tmp_path):
    manifest = manifest_of(build(road, tmp_path / "dist").folder)
    onnx, tflite = (next(a for a in manifest.artifacts if a.name == name) for name in ("onnx_static_int8", "tflite_static_int8"))
    assert onnx.file == "onnx/model.onnx" and onnx.tensors["inputs"][0]["name"] == "input_ids" and onnx.files == [onnx.file]
    assert onnx.gates["perplexity_change"] == 0.003 and onnx.gates["top1"] == 0.99
    here = [device for device in tflite.runtimes if device.device == "local"]
    assert [device.runtime for device in here] == [device.runtime for device in tflite.runtimes if device.emulated] == ["litert", "tflite"]
    assert all(device.passed and device.runtime_version == "2.3.0" for device in tflite.runtimes)
    recipe = (tmp_path / "dist/tiny-android-bundle/recipe.toml").read_bytes()
    assert manifest.provenance.recipe_sha256 == hashlib.sha256(recipe).hexdigest()
    assert manifest.provenance.checkpoint_sha256 == ["ab" * 32] and manifest.licence == "apache-2.0"
    assert manifest.prompt.format == "plain text" and manifest.fp32_bytes == 4 * 90_000
    roles = {file.path: file.role for file in manifest.files}
    assert roles["onnx/tokenizer_config.json"] == roles["litert/tokenizer.json"] == "tokenizer" and roles["NOTICE"] == "licence"
    assert roles["onnx/required_operators.config"] == "runtime" and roles["litert/model.tflite"] == "artifact"
    others = {other.name: other for other in manifest.other_runtimes}
    assert others["onnxruntime-genai"].opens == "onnx" and others["LiteRT-LM"].opens is None
    assert "LiteRT-LM feeds int32 tokens" in others["LiteRT-LM"].note


def test_a_cache_of_other_numbers_promises_no_other_runtime(road, tmp_path):
    path = road["onnx_int8"] / "onnx_static_int8.json"
    sidecar = json.loads(path.read_text())
    sidecar["tensors"]["inputs"][1]["dtype"] = "int8"
    path.write_text(json.dumps(sidecar))
    manifest = manifest_of(build(road, tmp_path / "dist").folder)
    others = [other for other in manifest.other_runtimes if other.note == "not tried with a KV cache of int8"]
    assert [other.opens for other in others] == [None, None]


def test_chat_template_is_in_the_manifest_and_beside_the_model(road, tmp_path):
    (road["checkpoint"] / "chat_template.jinja").write_text("{{ messages }}")
    folder = build(road, tmp_path / "dist").folder
    assert manifest_of(folder).prompt.model_dump() == {"format": "chat", "chat_template": "{{ messages }}"}
    assert (folder / "onnx/chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat template" in (folder / "README.md").read_text()


def test_tokenizer_class_beside_the_model_is_the_proved_one(road, tmp_path):
    folder = build(road, tmp_path / "dist").folder
    classes = {
        place: json.loads((folder / place / "tokenizer_config.json").read_text())["tokenizer_class"] for place in ("onnx", "tokenizer")
    }
    assert classes == {"onnx": "GPT2Tokenizer", "tokenizer": "TokenizersBackend"}
    record = json.loads((road["tokenizer"] / "tokenizer_graph.json").read_text())
    (road["tokenizer"] / "tokenizer_graph.json").write_text(json.dumps({**record, "parity": False, "reason": "differs"}))
    folder = build(road, tmp_path / "other").folder
    assert json.loads((folder / "onnx/tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    genai = next(other for other in manifest_of(folder).other_runtimes if other.name == "onnxruntime-genai")
    assert "its tokenizer is not proved here" in genai.note


def test_optimum_is_promised_only_where_it_takes_the_right_head_size(road, tmp_path):
    (road["cluster"] / "config.json").write_text(json.dumps({"hidden_size": 96, "num_attention_heads": 4}))
    manifest = manifest_of(build(road, tmp_path / "dist").folder)
    (optimum,) = [other for other in manifest.other_runtimes if other.name.startswith("optimum")]
    assert optimum.opens is None and "24" in optimum.note and "16 wide" in optimum.note
    assert "ORTModelForCausalLM.from_pretrained" not in (tmp_path / "dist/tiny-android-bundle/README.md").read_text()


def test_zip_holds_the_folder_and_nothing_else(road, tmp_path):
    built = build(road, tmp_path / "dist")
    with zipfile.ZipFile(built.archive) as archive:
        assert archive.testzip() is None
        packed = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        assert [entry.filename for entry in archive.infolist()] == sorted(packed)
        assert {(entry.date_time, entry.external_attr) for entry in archive.infolist()} == {((1980, 1, 1, 0, 0, 0), 0o100644 << 16)}
    assert packed == {f"tiny-android-bundle/{name}": data for name, data in tree(built.folder).items()}


def test_same_inputs_same_bundle(road, tmp_path):
    first, second = build(road, tmp_path / "first"), build(road, tmp_path / "second")
    assert tree(first.folder) == tree(second.folder)
    assert first.archive.read_bytes() == second.archive.read_bytes()


def whole_bundle(folder: Path, archive: Path, key: str) -> Manifest | None:
    kept = kept_bundle(folder, archive, key)
    return kept.manifest if kept else None


def kept_report(folder: Path, archive: Path, key: str) -> Report | None:
    kept = kept_bundle(folder, archive, key)
    return kept.report if kept else None


def test_whole_bundle_is_recognised_and_a_touched_one_is_not(road, tmp_path):
    built = build(road, tmp_path / "dist")
    places = (built.folder, built.archive)
    assert whole_bundle(*places, "key") == manifest_of(built.folder) and not whole_bundle(*places, "other key")
    data = built.archive.read_bytes()
    for spoilt in (data[:-40], data[:2000] + b"!" + data[2001:]):
        built.archive.write_bytes(spoilt)
        assert not whole_bundle(*places, "key")
    built.archive.write_bytes(data)
    (built.folder / "LICENSE").write_text("another")
    assert not whole_bundle(*places, "key")
    build(road, tmp_path / "dist")
    assert whole_bundle(*places, "key")
    built.archive.unlink()
    assert not whole_bundle(*places, "key") and not whole_bundle(tmp_path / "none", built.archive, "key")


def test_what_was_measured_is_kept_by_folder_or_zip(road, tmp_path):
    """A program that leaves a file in the folder costs a new folder, not a new measurement."""
    built = build(road, tmp_path / "dist")
    places = (built.folder, built.archive)
    report = kept_report(*places, "key")
    assert report.model_dump(mode="json") == json.loads((built.folder / "report.json").read_text())
    (built.folder / "litert/model.tflite.cache").write_text("packed")
    assert kept_report(*places, "key") == report and not whole_bundle(*places, "key") and kept_report(*places, "other") is None
    (built.folder / "litert/model.tflite.cache").unlink()
    built.archive.write_bytes(built.archive.read_bytes()[:-40])
    assert kept_report(*places, "key") == report
    (built.folder / "LICENSE").write_text("another")
    assert kept_report(*places, "key") is None


@pytest.mark.parametrize(
    "other",
    [
        BundleOptions(),
        BundleOptions(variants=("onnx_fp32",)),
        BundleOptions(variants=("all",), split_mb=0.05),
        BundleOptions(variants=("all",), key=Ed25519PrivateKey.from_private_bytes(bytes(32))),
        BundleOptions(variants=("all",), ort=True),
    ],
)
def test_a_whole_bundle_is_of_use_only_where_it_is_as_asked(other, road, tmp_path):
    built = build(road, tmp_path / "dist")
    manifest = manifest_of(built.folder)
    assert as_asked(manifest, built.archive, EVERYTHING) and not as_asked(manifest, built.archive, other)


def test_parts_of_the_zip_follow_what_is_asked(road, tmp_path):
    built = build(road, tmp_path / "dist", options=BundleOptions(variants=("all",), split_mb=0.1))
    assert len(built.parts) > 2 and all(part.stat().st_size == 100_000 for part in built.parts[:-1])
    assert b"".join(part.read_bytes() for part in built.parts) == built.archive.read_bytes()
    assert as_asked(manifest_of(built.folder), built.archive, BundleOptions(variants=("all",), split_mb=0.1))
    built = build(road, tmp_path / "dist")
    assert built.parts == () and not list((tmp_path / "dist").glob("*.zip.*"))
    with pytest.raises(UserError, match="give a larger one"):
        build(road, tmp_path / "dist", options=BundleOptions(split_mb=0.0001))
    assert whole_bundle(built.folder, built.archive, "key")


def test_size_is_told_with_what_weighs_most_where_it_is_over_the_aim(road, tmp_path):
    built = build(road, tmp_path / "dist")
    assert built.share == built.archive.stat().st_size / 360_000 and built.share > AIM
    line = size_line(built)
    assert f"{built.share:.0%} of the exported model's 0.4 MB" in line and "most of it: onnx/onnx_fp32.onnx" in line
    assert "most of it" not in size_line(dataclasses.replace(built, fp32_bytes=10**9))


NAMES = st.text(alphabet="abcXYZ019._-", min_size=1, max_size=8).filter(lambda name: name.strip("."))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(st.tuples(NAMES, NAMES), st.binary(max_size=200), max_size=6), order=st.randoms())
def test_zip_depends_on_names_and_bytes_only(tmp_path_factory, files, order):
    archives = []
    for turn in range(2):
        folder = tmp_path_factory.mktemp("zipped") / "content"
        folder.mkdir()
        items = list(files.items())
        order.shuffle(items)
        for (place, name), data in items:
            (folder / place).mkdir(exist_ok=True)
            (folder / place / name).write_bytes(data)
            os.utime(folder / place / name, (10**9 + turn, 10**9 + turn))
            (folder / place / name).chmod(0o600 if turn else 0o755)
        write_zip(folder, folder.parent / "out.zip", "root")
        archives.append((folder.parent / "out.zip").read_bytes())
    assert archives[0] == archives[1]


def test_failed_report_gives_no_bundle_and_keeps_the_old_one(road, tmp_path):
    built = build(road, tmp_path / "dist")
    before = (tree(built.folder), built.archive.read_bytes())
    with pytest.raises(GateError, match="1 gate failed, no bundle was written") as caught:
        build(road, tmp_path / "dist", worse="tflite_static_int8")
    assert "\ntflite_static_int8 in tflite on local: top1 0.5000 is below 0.9900" in str(caught.value)
    assert (tree(built.folder), built.archive.read_bytes()) == before
    aside = tmp_path / "dist/tiny-failed-report.json"
    assert json.loads(aside.read_text())["passed"] is False and aside.with_suffix(".html").is_file()
    build(road, tmp_path / "dist")
    assert not aside.exists() and not aside.with_suffix(".html").exists()


def test_artifact_whose_bytes_were_not_measured_stays_out(road, tmp_path):
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    path = road["onnx_int8"] / "onnx_static_int8.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(GateError, match="onnx_static_int8.onnx: its bytes are not those that were measured"):
        build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), tmp_path / "dist")
    assert not (tmp_path / "dist/tiny-android-bundle").exists() and not list((tmp_path / "dist").glob(".*draft*"))


def test_artifact_remade_after_the_measurement_stays_out(road, tmp_path):
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    sidecar = road["onnx_int8"] / "onnx_static_int8.json"
    sidecar.write_text(sidecar.read_text().replace(json.loads(sidecar.read_text())["sha256"], "12" * 32))
    with pytest.raises(GateError, match="onnx_static_int8: no passing measurement of these bytes"):
        build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), tmp_path / "dist")


def test_full_disk_is_one_line_and_leaves_the_old_bundle(road, tmp_path, monkeypatch):
    built = build(road, tmp_path / "dist")
    before = tree(built.folder)

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundling, "write_zip", no_room)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        build(road, tmp_path / "dist")
    assert tree(built.folder) == before and not list((tmp_path / "dist").glob(".*draft*"))


def test_unexpected_error_is_no_disk_full(road, tmp_path):
    (road["golden"] / "golden.npz").unlink()
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    with pytest.raises(FileNotFoundError):
        build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), tmp_path / "dist")
    assert not list((tmp_path / "dist").glob(".*draft*"))


def test_out_that_is_a_file_is_one_line(road, tmp_path):
    (tmp_path / "dist").write_text("")
    with pytest.raises(UserError, match="no folder can be made there"):
        build(road, tmp_path / "dist")


def test_tokenizer_without_parity_ships_alone_and_says_why(tmp_path):
    folder = build(fake_road(tmp_path / "road", parity=False), tmp_path / "dist").folder
    manifest = manifest_of(folder)
    assert manifest.tokenizer.encode_graph is None and "7 of 900" in manifest.tokenizer.reason
    assert not list(folder.rglob("tokenizer*.onnx"))
    assert "7 of 900 texts" in (folder / "README.md").read_text() and "7 of 900 texts" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("stated", "with_text", "told"), [("mit", False, "mit"), (None, False, "unknown"), (None, True, "see LICENSE")])
def test_licence(road, tmp_path, stated, with_text, told):
    record = json.loads((road["checkpoint"] / "checkpoint.json").read_text())
    (road["checkpoint"] / "checkpoint.json").write_text(json.dumps({**record, "licence": stated}))
    if not with_text:
        (road["checkpoint"] / "LICENSE").unlink()
    folder = build(road, tmp_path / "dist").folder
    assert manifest_of(folder).licence == told
    text = (folder / "LICENSE").read_text()
    assert ("Do what you like." in text) == with_text and (stated is None or with_text or stated in text)


def test_readme_has_the_bundle_s_own_numbers_and_says_first_what_it_costs(road, tmp_path):
    folder = build(road, tmp_path / "dist").folder
    text = (folder / "README.md").read_text()
    for artifact in json.loads((folder / "report.json").read_text())["artifacts"]:
        for device in artifact["devices"]:
            if not device["emulated"]:
                assert f"| {device['decode_tokens_per_s']:.0f} | {device['decode_ms_p50']:.2f} | {device['decode_ms_p99']:.2f} |" in text
    assert "On arm64 (aarch64, emulated) every file gave the same answers" in text and "at least 99.80 %" in text
    assert "Not tested: ssh://pi: no route to host." in text
    assert (
        text.index("A language model of") < text.index("## What it costs") < text.index("## How to use it") < text.index("## What is here")
    )
    for told in (
        "`past_key_values.0.key`",
        "onnx/model.onnx",
        "-m device_tests --artifact onnx/onnx_static_int8.json",
        "--include_ops_by_config onnx/required_operators.config",
        'og.Model("onnx")',
    ):
        assert told in text
    assert "{{" not in text and "Undefined" not in text
