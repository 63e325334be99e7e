"""The bill of materials: valid CycloneDX, complete, and the same bytes for the same bundle."""

import json
import uuid

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from pipeline.bundle import build_bundle
from pipeline.bundle_files import BundleInputs
from pipeline.manifest import Manifest
from pipeline.report import build_report
from pipeline.sbom import licences, sbom
from pipeline.tests.fake_road import fake_outcome, fake_recipe, fake_road, fake_stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sbom")
    road = fake_road(root / "road")
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key"), root / "dist").folder


@pytest.fixture(scope="module")
def manifest(folder) -> Manifest:
    return Manifest.model_validate_json((folder / "manifest.json").read_bytes())


def test_it_is_valid_and_lists_every_file_with_its_hash(folder, manifest):
    text = (folder / "sbom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    listed = {part["name"]: part for part in json.loads(text)["components"]}
    for file in manifest.files:
        if file.path != "sbom.cdx.json":
            assert listed[file.path]["hashes"] == [{"alg": "SHA-256", "content": file.sha256}], file.path
    assert listed["onnx/model.onnx"]["type"] == "machine-learning-model"
    assert listed["onnx/model.onnx"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert listed["onnxruntime"]["purl"] == "pkg:pypi/onnxruntime@2.3.0" and {"ai-edge-litert", "tflite-runtime"} <= listed.keys()


def test_it_says_what_the_whole_is_and_which_libraries_made_it(folder, manifest):
    metadata = json.loads((folder / "sbom.cdx.json").read_text(encoding="utf-8"))["metadata"]
    assert metadata["component"]["name"] == "tiny" and "models/tiny" in metadata["component"]["description"]
    tools = {tool["name"]: tool["version"] for tool in metadata["tools"]["components"]}
    assert manifest.provenance.versions.items() <= tools.items() and "pocketlm" in tools


def test_serial_number_and_time_follow_from_the_content(manifest):
    first = json.loads(sbom(manifest))
    assert sbom(manifest) == sbom(manifest) and first["metadata"]["timestamp"].startswith("1980-01-01T00:00:00")
    uuid.UUID(first["serialNumber"].removeprefix("urn:uuid:"))
    changed = manifest.model_copy(update={"files": [manifest.files[0].model_copy(update={"sha256": "0" * 64}), *manifest.files[1:]]})
    assert json.loads(sbom(changed))["serialNumber"] != first["serialNumber"]


@pytest.mark.parametrize(
    ("name", "told"),
    [("apache-2.0", "Apache-2.0"), ("MIT", "MIT"), ("llama3.2", None), ("unknown", ""), ("see LICENSE", "")],
)
def test_licences_are_spdx_ids_where_they_are_some(name, told):
    found = licences(name)
    assert bool(found) == (told != "")
    if found:
        assert (found[0].id, found[0].name) == (told, None if told else name)
