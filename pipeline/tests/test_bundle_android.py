"""The ``android/`` folder of a bundle: what is in it, that Gradle would find all it names, and Play's limits."""

import io
import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

from conftest import tiny_tokenizer
from pipeline import bundle_android
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.bundle_files import BundleOptions
from pipeline.manifest import Manifest
from pipeline.recipe import load_recipe
from pipeline.report import build_report
from pipeline.tests import kotlin_tools
from pipeline.tests.fake_road import ARTIFACTS, fake_outcome, fake_road, fake_stages

pytest_plugins = ["pipeline.tests.kotlin_fixtures"]

ANDROID = "{http://schemas.android.com/apk/res/android}"


def build(folder: Path, artifacts=ARTIFACTS, variants=None, tokenizer=True) -> Path:
    road = fake_road(folder / "road")
    if tokenizer:
        tiny_tokenizer().backend_tokenizer.save(str(road["tokenizer"] / "tokenizer.json"))
    recipe = load_recipe(None, ['name="tiny"', f"artifacts={json.dumps(artifacts)}"])
    report = build_report(recipe, road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(recipe, road, report, "key", BundleOptions(variants=variants)), folder / "dist").folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("bundle"), variants=("all",))


def text(bundle: Path, name: str) -> str:
    return (bundle / "android" / name).read_text(encoding="utf-8")


def properties(bundle: Path, name: str) -> dict[str, str]:
    lines = [line for line in text(bundle, name).splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_small_and_holds_no_model(bundle):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((bundle / "android").rglob("*")):
            archive.write(path, path.relative_to(bundle))
    assert len(packed.getvalue()) < 100_000
    names = names_in(bundle / "android")
    assert not any(name.endswith((".onnx", ".tflite", ".data", ".npz", ".jar", ".j2")) for name in names)
    assert {"settings.gradle.kts", "build.gradle.kts", "gradle.properties", "artifacts.properties", "README.md", ".gitignore"} <= names
    assert {"model/build.gradle.kts", "pocketlm/consumer-rules.pro", "gradle/wrapper/gradle-wrapper.properties"} <= names


def test_every_file_of_it_is_in_the_manifest(bundle):
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_text())
    listed = {file.path: file.role for file in manifest.files}
    assert {f"android/{name}": "android" for name in names_in(bundle / "android")}.items() <= listed.items()
    assert listed["tokenizer/text_rules.json"] == "tokenizer"


def test_files_of_each_artifact_are_there_and_enough_to_open_it(bundle):
    found = properties(bundle, "artifacts.properties")
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = found["artifacts"].split(", ")
    assert names == [artifact["name"] for artifact in manifest["artifacts"]]
    for artifact in manifest["artifacts"]:
        files = found[f"{artifact['name']}.files"].split(",")
        assert all((bundle / path).is_file() for path in files)
        assert {"manifest.json", "tokenizer/tokenizer.json", "tokenizer/text_rules.json", artifact["sidecar"], *artifact["files"]} == set(
            files
        )
        assert found[f"{artifact['name']}.runtime"] == {"onnx": "onnx", "tflite": "litert"}[artifact["format"]]
    assert properties(bundle, "gradle.properties")["pocketlm.artifact"] in names


def test_modules_folders_and_catalogue_entries_that_gradle_is_told_exist(bundle):
    android = bundle / "android"
    modules = re.findall(r'include\(":(\w+)"\)', text(bundle, "settings.gradle.kts"))
    assert modules == ["pocketlm", "sample", "model"] and all((android / module / "build.gradle.kts").is_file() for module in modules)
    catalogue = tomllib.loads(text(bundle, "gradle/libs.versions.toml"))
    known = {name.replace("-", ".") for name in catalogue["libraries"]} | {
        "plugins." + name.replace("-", ".") for name in catalogue["plugins"]
    }
    scripts = {path.relative_to(android).as_posix(): path.read_text() for path in android.rglob("*.gradle.kts")}
    used = {name for script in scripts.values() for name in re.findall(r"\blibs\.([a-z.]+)", script)}
    assert used == known, "each entry of the catalogue is used, and nothing else"
    named = {entry["version"]["ref"] for part in ("libraries", "plugins") for entry in catalogue[part].values()}
    assert named == catalogue["versions"].keys()
    for name, script in scripts.items():
        folder = (android / name).parent
        for place in re.findall(r'"(\.\./\.\./[^"]*|src/[a-z]+/kotlin|consumer-rules\.pro)"', script):
            assert (folder / place).exists(), f"{name}: {place}"
        assert script.count("{") == script.count("}") and script.count("(") == script.count(")") and "{{" not in script
    for source_set in ("onnx", "litert"):
        assert (android / f"pocketlm/src/{source_set}/kotlin").is_dir()


def test_xml_is_well_formed_and_names_what_is_there(bundle):
    sample = bundle / "android/sample/src/main"
    strings = ElementTree.parse(sample / "res/values/strings.xml").getroot()
    known = {entry.attrib["name"] for entry in strings.iter("string")}
    manifest = ElementTree.parse(sample / "AndroidManifest.xml").getroot()
    application, activity = manifest.find("application"), manifest.find("application/activity")
    assert application.attrib[f"{ANDROID}label"] == "@string/app_name" and "app_name" in known
    namespace = re.search(r'namespace = "([a-z.]+)"', text(bundle, "sample/build.gradle.kts")).group(1)
    source = sample / "kotlin" / namespace.replace(".", "/") / (activity.attrib[f"{ANDROID}name"][1:] + ".kt")
    assert source.is_file() and f"package {namespace}\n" in source.read_text()
    assert activity.attrib[f"{ANDROID}exported"] == "true", "Android 12 refuses a launcher that does not say so"
    assert manifest.findall("uses-permission") == []
    assert set(re.findall(r"R\.string\.(\w+)", source.read_text())) == known - {"app_name"}


def test_versions_are_those_that_the_model_was_proved_in(bundle):
    versions = tomllib.loads(text(bundle, "gradle/libs.versions.toml"))["versions"]
    runtimes = {
        device["runtime"]: device["runtime_version"]
        for artifact in json.loads((bundle / "manifest.json").read_text())["artifacts"]
        for device in artifact["runtimes"]
    }
    assert (versions["onnxruntime"], versions["litert"]) == (runtimes["onnxruntime"], runtimes["litert"])
    assert versions["kotlin"] == bundle_android.KOTLIN


@pytest.mark.parametrize(("artifact", "source_set"), [("onnx_static_int8", "onnx"), ("tflite_static_int8", "litert")])
def test_a_bundle_of_one_format_has_one_runtime(artifact, source_set, tmp_path):
    bundle = build(tmp_path, [artifact])
    names = names_in(bundle / "android")
    other = {"onnx": "litert", "litert": "onnx"}[source_set]
    assert any(f"src/{source_set}/" in name for name in names) and not any(f"src/{other}/" in name for name in names)
    catalogue, script = text(bundle, "gradle/libs.versions.toml"), text(bundle, "pocketlm/build.gradle.kts")
    assert (f"{other} =" in catalogue, f'"{other}" ->' in script) == (False, False) and f'"{source_set}" -> implementation' in script


def test_the_smallest_answer_times_download_is_the_default(bundle):
    assert properties(bundle, "gradle.properties")["pocketlm.artifact"].endswith("static_int8")


def test_a_model_too_large_for_a_pack_says_so_and_is_not_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_android, "PACK_LIMIT_BYTES", 10)
    bundle = build(tmp_path)
    assert not (bundle / "android/model").exists() and ":model" not in text(bundle, "settings.gradle.kts") + text(
        bundle, "sample/build.gradle.kts"
    )
    default = properties(bundle, "gradle.properties")["pocketlm.artifact"]
    said = properties(bundle, "artifacts.properties")[f"{default}.too_large"]
    assert said.startswith(f"{default} is 0.00 GB compressed; Play takes packs of") and said in text(bundle, "README.md")


def test_one_model_within_the_limit_is_chosen_before_a_better_one_beyond_it(tmp_path, monkeypatch):
    bundle = build(tmp_path / "free", variants=("all",))
    better = properties(bundle, "gradle.properties")["pocketlm.artifact"]
    sizes = {entry["name"]: entry["bytes_compressed"] for entry in json.loads((bundle / "manifest.json").read_text())["artifacts"]}
    other = min((name for name in sizes if name != better), key=sizes.get)
    if sizes[other] >= sizes[better]:
        pytest.fail(f"the example has no smaller one than {better}: {sizes}")
    common = 20_000  # tokenizer and its rules, deflated, are less
    monkeypatch.setattr(bundle_android, "PACK_LIMIT_BYTES", (sizes[other] + sizes[better]) // 2 + common // 4)
    chosen = build(tmp_path / "limited", variants=("all",))
    assert properties(chosen, "gradle.properties")["pocketlm.artifact"] == other and (chosen / "android/model").is_dir()


def test_a_tokenizer_of_another_kind_is_told_and_ids_still_work(tmp_path):
    bundle = build(tmp_path, tokenizer=False)
    assert not (bundle / "tokenizer/text_rules.json").exists() and "text_rules" not in text(bundle, "artifacts.properties")
    assert "of this tokenizer it does not cut bytes as GPT-2 does" in text(bundle, "README.md")


def test_where_the_library_can_open_nothing_there_is_no_folder(bundle, tmp_path):
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_text())
    int8 = [entry.model_copy(update={"name": "tflite_full_int8"}) for entry in manifest.artifacts if entry.format == "tflite"]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    report = build_report_of(int8)
    bundle_android.write_android(tmp_path, manifest.model_copy(update={"artifacts": int8}), report)
    assert not (tmp_path / "android").exists()


class build_report_of:  # only the names are asked for
    def __init__(self, entries):
        self.artifacts = entries


def test_the_build_links_each_model_from_the_bundle(onnx_library, bundle, tmp_path):
    assets = tmp_path / "assets"
    found = properties(bundle, "artifacts.properties")
    for name in ("onnx_static_int8", "tflite_static_int8", "onnx_static_int8"):  # a change of mind leaves nothing behind
        answer = onnx_library.ask("link", bundle=str(bundle), artifact=name, assets=str(assets))
        files = found[f"{name}.files"].split(",")
        assert names_in(assets) == {f"model/{path}" for path in files}
        assert all((assets / "model" / path).read_bytes() == (bundle / path).read_bytes() for path in files)
        assert answer["runtime"] == found[f"{name}.runtime"] and answer["too_large"] is None
    assert "give one of onnx_fp32" in onnx_library.ask("link", bundle=str(bundle), artifact="nonsense", assets=str(assets))["illegal"]
    (assets / "model/onnx/model.onnx").unlink()
    (assets / "model/onnx/model.onnx").write_bytes(b"half a copy")
    onnx_library.ask("link", bundle=str(bundle), artifact="onnx_static_int8", assets=str(assets))
    assert (assets / "model/onnx/model.onnx").read_bytes() == (bundle / "onnx/model.onnx").read_bytes()


def test_the_sample_compiles_against_the_library(bundle, tmp_path):
    """With R and BuildConfig as Gradle would make them of the bundle's own files."""
    names = re.findall(r'<string name="(\w+)"', text(bundle, "sample/src/main/res/values/strings.xml"))
    fields = re.findall(r'buildConfigField\("(\w+)", "(\w+)"', text(bundle, "sample/build.gradle.kts"))
    constants = "".join(f"public static final int {name} = 0;" for name in names)
    package = tmp_path / "pocketlm/sample"
    package.mkdir(parents=True)
    (package / "R.java").write_text(
        f"package pocketlm.sample; public final class R {{ public static final class string {{ {constants} }} }}"
    )
    constants = "".join(f'public static final {kind} {name} = "";' for kind, name in fields)
    (package / "BuildConfig.java").write_text(f"package pocketlm.sample; public final class BuildConfig {{ {constants} }}")
    try:
        kotlin_tools.sample(tmp_path)
    except kotlin_tools.Unavailable as reason:
        pytest.skip(str(reason))


def test_gradle_scripts_are_kotlin(bundle, tmp_path):
    """Their grammar. That Gradle's and Android's plug-ins know what they call cannot be tried without these."""
    android = bundle / "android"
    scripts = {path.relative_to(android).as_posix(): path.read_text() for path in sorted(android.rglob("*.gradle.kts"))}
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    try:
        assert kotlin_tools.syntax_faults(scripts, tmp_path / "good") == []
    except kotlin_tools.Unavailable as reason:
        pytest.skip(str(reason))
    broken = {"broken": scripts["pocketlm/build.gradle.kts"].replace('srcDirs("', 'srcDirs(("', 1)}
    assert kotlin_tools.syntax_faults(broken, tmp_path / "bad") != []
