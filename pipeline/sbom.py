"""``sbom.cdx.json``: the bundle's parts as a CycloneDX bill of materials (ECMA-424, version 1.6), by its own library.

The same bundle gives the same bytes: the serial number comes from the content, and the time is the epoch that zips know, because a
time of building would be the one thing that differs.
"""

import importlib.metadata
from datetime import UTC, datetime
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from pipeline.manifest import File, Manifest
from pipeline.zip_folder import ZIP_DATE

SBOM = "sbom.cdx.json"
UNKNOWN_LICENCES = ("unknown", "see LICENSE")
TYPES = {"artifact": ComponentType.MACHINE_LEARNING_MODEL, "golden": ComponentType.DATA}  # by role; all else is a plain file
OUR_ROLES, OURS = ("program", "android", "example"), "Apache-2.0"
ITS_ROLES = ("artifact", "tokenizer")  # under the model's licence
RUNTIMES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert", "tflite": "tflite-runtime"}  # as PyPI calls them


def sbom(manifest: Manifest) -> str:
    """The bill as JSON: the model as the whole, its files, the runtimes that it was proved in, and the libraries that made it."""
    whole = Component(
        name=manifest.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="bundle",
        version=manifest.provenance.build_key[:16],
        description=f"made from {manifest.provenance.source}",
        licenses=licences(manifest.licence),
        properties=[Property(name="pocketlm:checkpoint_sha256", value=digest) for digest in manifest.provenance.checkpoint_sha256],
    )
    parts = [file_component(file, manifest) for file in manifest.files]
    needed = [library(name, version) for name, version in sorted(runtimes(manifest).items())]
    program = Component(name="pocketlm", type=ComponentType.APPLICATION, bom_ref="pocketlm", version=importlib.metadata.version("pocketlm"))
    tools = [program, *(library(name, version, "made-with:") for name, version in sorted(manifest.provenance.versions.items()))]
    bom = Bom(
        serial_number=uuid5(NAMESPACE_URL, "\n".join(f"{file.sha256} {file.path}" for file in manifest.files)),
        metadata=BomMetaData(component=whole, tools=ToolRepository(components=tools), timestamp=datetime(*ZIP_DATE, tzinfo=UTC)),
        components=[*parts, *needed],
    )
    bom.register_dependency(whole, [*parts, *needed])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def file_component(file: File, manifest: Manifest) -> Component:
    """One file of the bundle with its hash."""
    return Component(
        name=file.path,
        type=TYPES.get(file.role, ComponentType.FILE),
        bom_ref=f"file:{file.path}",
        hashes=[sha256(file.sha256)],
        licenses=licences(OURS) if file.role in OUR_ROLES else licences(manifest.licence) if file.role in ITS_ROLES else [],
        properties=[Property(name="pocketlm:role", value=file.role), Property(name="pocketlm:bytes", value=str(file.bytes))],
    )


def library(name: str, version: str, prefix: str = "") -> Component:
    """A distribution on PyPI; a local part of its version, such as +cpu, is none there."""
    plain = version.partition("+")[0]
    purl = PackageURL("pypi", name=name.lower().replace("_", "-"), version=plain)
    return Component(name=name, type=ComponentType.LIBRARY, version=version, bom_ref=f"{prefix}{purl}", purl=purl)


def runtimes(manifest: Manifest) -> dict[str, str]:
    """Version by distribution of every runtime that an artifact was proved in."""
    devices = [device for artifact in manifest.artifacts for device in artifact.runtimes if device.runtime_version]
    return {RUNTIMES.get(device.runtime, device.runtime): device.runtime_version for device in devices}


def licences(name: str) -> list[License]:
    """As an SPDX id where it is one in any case of its letters, else as a name; none where it is unknown."""
    return [] if name in UNKNOWN_LICENCES else [LicenseFactory().make_from_string(name)]


def sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
