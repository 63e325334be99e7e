"""Whether a bundle that lies there is whole, and is what is asked for: then it is not made again."""

from pathlib import Path

from models.errors import UserError
from pipeline.bundle_files import BundleOptions
from pipeline.contents import opened, read
from pipeline.litert_lm import obstacle
from pipeline.manifest import MANIFEST, Artifact, Manifest
from pipeline.ort_format import FLATBUFFER_LIMIT_BYTES
from pipeline.signing import key_sha256
from pipeline.verify import verify_bundle
from pipeline.zip_parts import parts_are


def whole_bundle(folder: Path, archive: Path, key: str) -> Manifest | None:
    """The manifest of folder and zip where both were made with ``key``, hold the same, and have every byte that they were made with."""
    if not (folder / MANIFEST).is_file() or not archive.is_file():
        return None
    try:
        found = [verify_bundle(path, replay=False) for path in (folder, archive)]
        manifests = {read_manifest(path) for path in (folder, archive)}
    except UserError:  # a zip that cannot be read is not whole
        return None
    if not all(verified.passed for verified in found) or len(manifests) != 1:
        return None
    manifest = Manifest.model_validate_json(manifests.pop())
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


def read_manifest(path: Path) -> bytes:
    """The manifest's bytes in a folder or zip."""
    with opened(path) as contents:
        return read(contents, MANIFEST) if MANIFEST in contents.sizes else b""
