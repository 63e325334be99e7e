"""Checks a bundle: first the signature, every name, size and hash, then the golden vectors in every runtime that is installed here.

Nothing in a bundle is opened by a runtime before its hash is checked, and nothing in it is ever executed: the golden vectors
are replayed by the installed ``device_tests``, not by the copy that travels in the bundle. A zip is judged by its directory
before a byte of it is unpacked.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from device_tests.devices.local import Run, run_local
from device_tests.gates import Gates
from device_tests.sessions import RUNTIMES
from models.errors import GateError, UserError
from pipeline.contents import BROKEN, Contents, opened, read, unpacked
from pipeline.manifest import MANIFEST, SIGNATURE, SUMS, UNLISTED, File, Manifest, sums
from pipeline.signing import SIGNATURE_BYTES, key_sha256, made_by

MAX_MANIFEST_BYTES = 16 << 20
MAX_SUMS_BYTES = 4 << 20


@dataclass(frozen=True)
class Replay:
    """The golden vectors of one artifact in one runtime on this machine."""

    artifact: str
    runtime: str
    passed: bool
    failures: tuple[str, ...]
    max_abs_diff: float | None
    top1: float | None


@dataclass(frozen=True)
class Verified:
    """What was found. ``faults`` are one line each and name the file; with any of them nothing was replayed.

    ``signature``: ``checked`` with the key that was given, ``unchecked`` without one, ``none`` where the bundle is not signed.
    """

    name: str
    files: int
    bytes: int
    signature: str
    faults: tuple[str, ...]
    replays: tuple[Replay, ...]
    not_installed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults and all(replay.passed for replay in self.replays)


def verify_bundle(path: Path, threads: int = 1, replay: bool = True, key: Ed25519PublicKey | None = None) -> Verified:
    """Check a bundle's folder, zip, or zip in parts; with ``key`` it has to be signed. UserError when there is none at ``path``."""
    with opened(path) as contents:
        manifest, faults = checked(contents, key=key)
        found = Verified(
            name=manifest.name if manifest else path.name,
            files=len(contents.sizes),
            bytes=sum(contents.sizes.values()),
            signature="none" if SIGNATURE not in contents.sizes else "checked" if key else "unchecked",
            faults=tuple(faults),
            replays=(),
            not_installed=(),
        )
        if manifest is None or faults or not replay:
            return found
        if contents.packed_bytes is None:
            replays, missing = replayed(path, manifest, threads)
        else:
            with unpacked(contents, files_of(manifest)) as folder:
                replays, missing = replayed(folder, manifest, threads)
        return replace(found, replays=replays, not_installed=missing)


@contextmanager
def bundle_folder(path: Path) -> Iterator[tuple[Path, Manifest]]:
    """A folder with the bundle's files, for programs that use one: a zip is unpacked into a folder that goes again.

    Files that a person put beside the bundle's own are let be. Raises GateError with the first fault when a name, size or hash
    is wrong, UserError when there is no bundle.
    """
    with opened(path) as contents:
        manifest, faults = checked(contents, allow_extra=True)
        if manifest is None or faults:
            raise GateError(f"{path}: {faults[0]}; take the bundle from its source again")
        if contents.packed_bytes is None:
            yield path, manifest
        else:
            with unpacked(contents, files_of(manifest)) as folder:
                yield folder, manifest


def files_of(manifest: Manifest) -> list[str]:
    return [file.path for file in manifest.files]


def checked(
    contents: Contents, allow_extra: bool = False, key: Ed25519PublicKey | None = None
) -> tuple[Manifest | None, list[str]]:  # fmt: skip
    """The manifest, and every fault of signature, names, sizes and hashes. Hashes are read only when names are in order."""
    if contents.faults:
        return None, contents.faults
    for name, limit in ((MANIFEST, MAX_MANIFEST_BYTES), (SUMS, MAX_SUMS_BYTES)):
        if name not in contents.sizes:
            return None, [f"{name}: missing"]
        if contents.sizes[name] > limit:
            return None, [f"{name}: {contents.sizes[name]} bytes, which no {name} has"]
    try:
        text = read(contents, MANIFEST)
        listed = read(contents, SUMS)
    except BROKEN as error:
        return None, [f"{MANIFEST} or {SUMS}: damaged ({error})"]
    if fault := signature_fault(contents, listed, key):
        return None, [fault]
    manifest_sha256 = hashlib.sha256(text).hexdigest()
    if f"{manifest_sha256}  {MANIFEST}\n".encode() not in listed:
        return None, [f"{MANIFEST}: its SHA-256 is not the one in {SUMS}; one of the two was changed"]
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        return None, [f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}"]
    if listed != sums(manifest, manifest_sha256).encode():
        return manifest, [f"{SUMS}: differs from {MANIFEST}"]
    if (manifest.signer is None) != (SIGNATURE not in contents.sizes):
        signed = "is signed, but the signature is missing" if manifest.signer else "is not signed, so this file is extra"
        return manifest, [f"{SIGNATURE}: {MANIFEST} says that the bundle {signed}"]
    return manifest, content_faults(contents, manifest, allow_extra)


def signature_fault(contents: Contents, listed: bytes, key: Ed25519PublicKey | None) -> str | None:
    """What is wrong with the signature over the sums ``listed``; without ``key`` only its length can be."""
    if SIGNATURE not in contents.sizes:
        return f"{SIGNATURE}: missing, so nothing says whose bundle this is" if key else None
    if contents.sizes[SIGNATURE] != SIGNATURE_BYTES:
        return f"{SIGNATURE}: {contents.sizes[SIGNATURE]} bytes, a signature has {SIGNATURE_BYTES}"
    try:
        signature = read(contents, SIGNATURE)
    except BROKEN as error:
        return f"{SIGNATURE}: damaged ({error})"
    if key and not made_by(key, signature, listed):
        return f"{SIGNATURE}: not made with the key that was given ({key_sha256(key)[:16]}…), or {SUMS} was changed"
    return None


def content_faults(contents: Contents, manifest: Manifest, allow_extra: bool) -> list[str]:
    """Missing, extra, renamed, longer, shorter and changed files, and artifacts that the manifest does not list as files."""
    expected = {file.path: file for file in manifest.files}
    present = contents.sizes.keys() - set(UNLISTED)
    missing, extra = sorted(expected.keys() - present), sorted(present - expected.keys())
    extra = [] if allow_extra and not missing else extra
    faults = renamed_missing_extra(contents, [expected[name] for name in missing], extra)
    unlisted = [path if path.isprintable() else ascii(path) for path in named(manifest) if path not in expected]
    faults += [f"{path}: named by {MANIFEST} but not among its files" for path in unlisted]
    for name in sorted(expected.keys() & present):
        file = expected[name]
        if contents.sizes[name] != file.bytes:
            faults.append(f"{name}: {contents.sizes[name]} bytes, the manifest says {file.bytes}")
            continue
        digest = sha256_or_fault(contents, name)
        if digest != file.sha256:
            faults.append(f"{name}: changed (SHA-256 {digest[:60]}, the manifest says {file.sha256})")
    return faults


def named(manifest: Manifest) -> list[str]:
    """Every path that the manifest tells a host to open."""
    tokenizer = manifest.tokenizer
    paths = [path for artifact in manifest.artifacts for path in (artifact.file, artifact.sidecar, *artifact.files)]
    paths += [path for artifact in manifest.artifacts for path in (artifact.prompt_file, artifact.ort_file, artifact.litert_lm_file)]
    paths += [tokenizer.file, tokenizer.encode_graph, tokenizer.decode_graph]
    return list(dict.fromkeys(path for path in paths if path is not None))


def renamed_missing_extra(contents: Contents, missing: list[File], extra: list[str]) -> list[str]:
    """One line per file that is not where it should be; an extra file with a missing one's size and hash was renamed.

    Nothing else that is extra is read: it may be of any size.
    """
    gone, faults = list(missing), []
    for name in extra:
        of_its_size = [file for file in gone if file.bytes == contents.sizes[name]]
        digest = sha256_or_fault(contents, name) if of_its_size else None
        former = next((file for file in of_its_size if file.sha256 == digest), None)
        if former:
            gone.remove(former)
        faults.append(f"{former.path}: renamed to {name}" if former else f"{name}: extra, not in the manifest")
    return faults + [f"{file.path}: missing" for file in gone]


def sha256_or_fault(contents: Contents, name: str) -> str:
    """Hex digest of a file, or why it cannot be read."""
    digest = hashlib.sha256()
    try:
        for block in contents.blocks(name):
            digest.update(block)
    except BROKEN as error:
        return f"unreadable: {error}"
    return digest.hexdigest()


def replayed(folder: Path, manifest: Manifest, threads: int) -> tuple[tuple[Replay, ...], tuple[str, ...]]:
    """Golden vectors of every artifact in every installed runtime that it was proved in, and the runtimes that are not installed."""
    found, missing = [], set()
    for artifact in manifest.artifacts:
        for runtime in dict.fromkeys(device.runtime for device in artifact.runtimes):
            library = RUNTIMES[runtime][2]
            if importlib.util.find_spec(library.split(".")[0]) is None:
                missing.add(runtime)
                continue
            run = Run(runtime, threads, Gates(**artifact.gates), timing=False)
            device = run_local(folder / artifact.sidecar, folder / "golden", run)["device"]
            passed, failures = device["passed"], tuple(device["failures"])
            found.append(Replay(artifact.name, runtime, passed, failures, device.get("max_abs_diff"), device.get("top1")))
    if not found:
        raise UserError(f"no runtime is installed that could replay this bundle ({', '.join(sorted(missing))}); install one")
    return tuple(found), tuple(sorted(missing))
