"""Checks a bundle: first every name, size and hash, then the golden vectors in every runtime that is installed here.

Nothing in a bundle is opened by a runtime before its hash is checked, and nothing in it is ever executed: the golden vectors
are replayed by the installed ``device_tests``, not by the copy that travels in the bundle. A zip is judged by its directory
before a byte of it is unpacked.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from device_tests.devices.local import Run, run_local
from device_tests.gates import Gates
from device_tests.sessions import RUNTIMES
from models.errors import GateError, UserError
from pipeline.contents import BROKEN, Contents, opened, read, unpacked
from pipeline.manifest import MANIFEST, SUMS, Manifest, sums

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
    """What was found. ``faults`` are one line each and name the file; with any of them nothing was replayed."""

    name: str
    files: int
    bytes: int
    faults: tuple[str, ...]
    replays: tuple[Replay, ...]
    not_installed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults and all(replay.passed for replay in self.replays)


def verify_bundle(path: Path, threads: int = 1, replay: bool = True) -> Verified:
    """Check a bundle's folder or zip. Raises UserError when there is none at ``path``."""
    with opened(path) as contents:
        manifest, faults = checked(contents)
        if manifest is None or faults:
            name = manifest.name if manifest else path.name
            return Verified(name, len(contents.sizes), sum(contents.sizes.values()), tuple(faults), (), ())
        if not replay:
            replays, missing = (), ()
        elif contents.packed_bytes is None:
            replays, missing = replayed(path, manifest, threads)
        else:
            with unpacked(contents, files_of(manifest)) as folder:
                replays, missing = replayed(folder, manifest, threads)
        return Verified(manifest.name, len(contents.sizes), sum(contents.sizes.values()), (), replays, missing)


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


def checked(contents: Contents, allow_extra: bool = False) -> tuple[Manifest | None, list[str]]:
    """The manifest, and every fault of names, sizes and hashes. Hashes are read only when names and sizes are in order."""
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
    return manifest, content_faults(contents, manifest, allow_extra)


def content_faults(contents: Contents, manifest: Manifest, allow_extra: bool) -> list[str]:
    """Missing, extra, renamed, longer, shorter and changed files, and artifacts that the manifest does not list as files."""
    expected = {file.path: file for file in manifest.files}
    present = contents.sizes.keys() - {MANIFEST, SUMS}
    missing, extra = sorted(expected.keys() - present), sorted(present - expected.keys())
    extra = [] if allow_extra and not missing else extra
    faults = renamed_missing_extra(contents, {name: expected[name].sha256 for name in missing}, extra)
    wanted = [path for artifact in manifest.artifacts for path in (artifact.file, artifact.sidecar)] + [manifest.tokenizer.file]
    faults += [f"{path}: named by {MANIFEST} but not among its files" for path in wanted if path not in expected]
    for name in sorted(expected.keys() & present):
        file = expected[name]
        if contents.sizes[name] != file.bytes:
            faults.append(f"{name}: {contents.sizes[name]} bytes, the manifest says {file.bytes}")
            continue
        digest = sha256_or_fault(contents, name)
        if digest != file.sha256:
            faults.append(f"{name}: changed (SHA-256 {digest[:60]}, the manifest says {file.sha256})")
    return faults


def renamed_missing_extra(contents: Contents, missing: dict[str, str], extra: list[str]) -> list[str]:
    """One line per file that is not where it should be; an extra file with a missing one's hash was renamed."""
    by_hash = {digest: name for name, digest in missing.items()}
    faults = []
    for name in extra:
        former = by_hash.pop(sha256_or_fault(contents, name), None) if by_hash else None
        faults.append(f"{former}: renamed to {name}" if former else f"{name}: extra, not in the manifest")
    return faults + [f"{name}: missing" for name in sorted(by_hash.values())]


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
