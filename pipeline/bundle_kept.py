"""Whether a bundle that lies there is whole, and is what is asked for: then it is not made again."""

from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from pipeline.bundle_files import BundleOptions
from pipeline.contents import opened, read
from pipeline.litert_lm import obstacle
from pipeline.manifest import MANIFEST, Artifact, Manifest
from pipeline.ort_format import FLATBUFFER_LIMIT_BYTES
from pipeline.report import Report
from pipeline.signing import key_sha256
from pipeline.verify import verify_bundle
from pipeline.zip_parts import parts_are

REPORT = "report.json"


@dataclass(frozen=True)
class Kept:
    """What was measured for a bundle, and its manifest; None where folder and zip are not both whole and of the same content."""

    report: Report
    manifest: Manifest | None


def kept_bundle(folder: Path, archive: Path, key: str) -> Kept | None:
    """What is left of a bundle that was made with ``key``: None where neither zip nor folder has every byte that it was made with."""
    found = {path: whole_manifest(path, key) for path in (archive, folder)}
    right = next((path for path, manifest in found.items() if manifest), None)
    if right is None:
        return None
    with opened(right) as contents:
        report = Report.model_validate_json(read(contents, REPORT))
    return Kept(report, found[folder] if found[folder] == found[archive] else None)


def whole_manifest(path: Path, key: str) -> Manifest | None:
    """The manifest of a folder or zip that was made with ``key`` and has every byte that it was made with."""
    try:
        if not path.exists() or not verify_bundle(path, replay=False).passed:
            return None
        with opened(path) as contents:
            manifest = Manifest.model_validate_json(read(contents, MANIFEST))
    except UserError:  # a zip that cannot be read is not whole
        return None
    return manifest if manifest.provenance.build_key == key else None


def as_asked(manifest: Manifest, archive: Path, options: BundleOptions) -> bool:
    """Whether a whole bundle has the artifacts, forms, parts and signature that ``options`` ask for."""
    asked = None if options.variants is None else sorted(options.variants)
    signer = None if options.key is None else key_sha256(options.key.public_key())
    forms = {form for artifact in manifest.artifacts for form, path in more_forms(artifact).items() if path}
    return (
        manifest.provenance.variants == asked
        and manifest.signer == signer
        and forms == {form for artifact in manifest.artifacts for form in more_forms(artifact) if getattr(options, form)}
        and parts_are(archive, options.part_bytes)
    )


def more_forms(artifact: Artifact) -> dict[str, str | None]:
    """The forms that an artifact can have besides its own, by option, and the file where it is there."""
    if artifact.format == "onnx":
        return {"ort": artifact.ort_file} if artifact.bytes <= FLATBUFFER_LIMIT_BYTES else {}
    return {"litert_lm": artifact.litert_lm_file} if artifact.recommended and obstacle(artifact) is None else {}
