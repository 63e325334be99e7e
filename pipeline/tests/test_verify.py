"""Verification: every way to tamper with a bundle is found and named, and nothing unsafe is unpacked or opened."""

import json
import os
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from models.errors import GateError, UserError
from pipeline import contents as reading
from pipeline import verify as verifying
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.manifest import FORMAT_VERSION, File
from pipeline.report import build_report
from pipeline.tests.fake_road import EVERYTHING, fake_outcome, fake_recipe, fake_road, fake_stages, with_toy
from pipeline.verify import bundle_folder, verify_bundle
from pipeline.zip_folder import write_zip
from pipeline.zip_parts import split

NAME = "tiny-android-bundle"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A bundle whose ONNX artifacts run and whose TFLite artifacts have no graph."""
    root = tmp_path_factory.mktemp("original")
    road = with_toy(fake_road(root / "road"))
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), root / "dist").folder


@pytest.fixture(scope="module")
def packed(original, tmp_path_factory):
    return zipped(original, tmp_path_factory.mktemp("packed") / "bundle.zip").read_bytes()


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / NAME)


@pytest.fixture(autouse=True)
def no_replay_of_faulty_bundles(request, monkeypatch):
    """Only the tests of replay may start a runtime: anything else that does has opened what it had found to be wrong."""
    if "replay" not in request.node.name:
        monkeypatch.setattr(verifying, "run_local", lambda *_: pytest.fail("a runtime was started"))


def faults_of(path) -> tuple[str, ...]:
    found = verify_bundle(path, replay=True)
    assert not found.passed and found.replays == ()
    return found.faults


def zipped(folder: Path, target: Path) -> Path:
    write_zip(folder, target, NAME)
    return target


def test_replay_passes_what_runs_and_fails_what_does_not(original, tmp_path):
    for path in (original, zipped(original, tmp_path / "bundle.zip")):
        found = verify_bundle(path, threads=1)
        assert found.faults == () and found.files == len(every_file(original))
        outcome = {(replay.artifact, replay.runtime): replay for replay in found.replays}
        assert set(outcome) == {
            (name, runtime)
            for form, runtimes in (("onnx", ["onnxruntime"]), ("tflite", ["litert", "tflite"]))
            for name in (f"{form}_fp32", f"{form}_static_int8")
            for runtime in runtimes
        }
        assert outcome["onnx_fp32", "onnxruntime"].passed and outcome["onnx_fp32", "onnxruntime"].top1 == 1.0
        broken = outcome["tflite_fp32", "litert"]  # right bytes, but no model
        assert not broken.passed and "tflite_fp32" in broken.failures[0] and not found.passed


def test_replay_uses_what_is_installed_not_what_the_bundle_brings(folder, monkeypatch):
    started = []

    def run_local(sidecar, golden, run):
        started.append((sidecar.name, golden.name, run.runtime, run.gates.top1, run.timing))
        return {"device": {"passed": True, "failures": [], "max_abs_diff": 0.0, "top1": 1.0}}

    monkeypatch.setattr(verifying, "run_local", run_local)
    monkeypatch.setattr(verifying.importlib.util, "find_spec", lambda name: None if name == "tflite_runtime" else object())
    found = verify_bundle(folder)
    assert found.passed and found.not_installed == ("tflite",)
    assert ("onnx_static_int8.json", "golden", "onnxruntime", 0.99, False) in started and len(started) == 4
    monkeypatch.setattr(verifying.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no runtime is installed"):
        verify_bundle(folder)


def test_without_replay_only_hashes_are_checked(folder):
    assert verify_bundle(folder, replay=False).passed


def every_file(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_changed_byte_in_any_file_is_found_and_named(folder, tmp_path):
    for name in every_file(folder):
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        for place in (folder, zipped(folder, tmp_path / "bundle.zip")):
            (fault,) = faults_of(place)
            assert name in fault, fault
        path.write_bytes(data)
    assert verify_bundle(folder, replay=False).passed


CHANGES = ("flip", "cut", "grow", "empty", "delete", "rename", "add", "swap", "link", "folder")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.sampled_from(CHANGES), where=st.integers(0, 10**6), other=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_change_of_any_file_goes_unseen(original, change, where, other, bit):
    """Any one change to any one file is a fault whose line names a file that it touched; taken back, the bundle is right again."""
    names = every_file(original)
    name, second = names[where % len(names)], names[other % len(names)]
    path = original / name
    kept = {each: (original / each).read_bytes() for each in (name, second)}
    data, touched, new = kept[name], {name}, original / f"{name}{other % 10}"
    assume(change != "swap" or kept[name] != kept[second])
    if change == "flip":
        place = other % len(data)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
    elif change in ("cut", "grow", "empty"):
        path.write_bytes({"cut": data[: other % len(data)], "grow": data + b"more", "empty": b""}[change])
    elif change == "delete":
        path.unlink()
    elif change in ("rename", "add"):
        new.write_bytes(data)
        touched = {name, new.relative_to(original).as_posix()} if change == "rename" else {new.relative_to(original).as_posix()}
        if change == "rename":
            path.unlink()
    elif change == "swap":
        path.write_bytes(kept[second])
        (original / second).write_bytes(data)
        touched = {name, second}
    else:
        path.unlink()
        path.symlink_to(original / second) if change == "link" else path.mkdir()
    faults = verify_bundle(original).faults
    path.unlink(missing_ok=True) if change != "folder" else path.rmdir()
    new.unlink(missing_ok=True)
    for each, content in kept.items():
        (original / each).write_bytes(content)
    assert faults and any(each in fault for fault in faults for each in touched), (change, name, faults)
    assert not any("\n" in fault for fault in faults)
    assert verify_bundle(original, replay=False).passed


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3), cut=st.booleans())
def test_no_damage_to_a_zip_breaks_out_or_goes_unseen(original, packed, places, cut):
    """Changed bytes anywhere in a zip, its directory above all: a fault, an error in one line, or contents that are the same."""
    data = bytearray(packed)
    for share, change in places:
        reach = 6000 if cut else len(data)  # half of the time near the end, where the directory is
        data[len(data) - 1 - int(share * reach)] ^= change
    path = original.parent / "damaged.zip"
    path.write_bytes(data)
    try:
        found = verify_bundle(path, replay=False)
    except UserError as error:
        assert "no zip that can be read" in str(error)
        return
    assert found.passed == (found.faults == ())
    if found.passed:
        with zipfile.ZipFile(path) as archive:
            contents = {entry.split("/", 1)[1]: archive.read(entry) for entry in archive.namelist()}
        assert contents == {name: (original / name).read_bytes() for name in every_file(original)}


def test_missing_extra_renamed_and_longer_files_are_named(folder):
    (folder / "LICENSE").unlink()
    (folder / "golden/golden.npz").rename(folder / "golden/silver.npz")
    (folder / "onnx/more.bin").write_bytes(b"more")
    (folder / "README.md").write_text("longer " * 9999)
    faults = faults_of(folder)
    assert len(faults) == 4
    for told in (
        "LICENSE: missing",
        "golden/golden.npz: renamed to golden/silver.npz",
        "onnx/more.bin: extra",
        "README.md: 69993 bytes",
    ):
        assert any(fault.startswith(told) for fault in faults), told


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_without_manifest_or_sums(folder, name):
    (folder / name).unlink()
    assert faults_of(folder) == (f"{name}: missing",)


def test_manifest_edited_with_its_sum_is_still_held_against_the_sums(folder):
    """Whoever changes a file and its hash in the manifest has to change the sums as well: then it is another bundle."""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"licence": "apache-2.0"', '"licence": "mit"'))
    (fault,) = faults_of(folder)
    assert "manifest.json" in fault and "SHA256SUMS" in fault


def rewrite_manifest(folder: Path, change) -> None:
    """Change the manifest as an attacker would: with fitting sums."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    text = json.dumps(data)
    (folder / "manifest.json").write_text(text)
    digest = verifying.hashlib.sha256(text.encode()).hexdigest()
    lines = {file["path"]: file["sha256"] for file in data["files"]} | {"manifest.json": digest}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {path}\n" for path, digest in sorted(lines.items())))


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/etc/passwd",
        "onnx/../../x",
        "a\\b",
        "C:x",
        "",
        ".",
        "a//b",
        "./a",
        "a\0b",
        "SHA256SUMS.sig",
        "manifest.json",
        "a\x1b[2J",
    ],
)
def test_paths_in_the_manifest_stay_inside(folder, path):
    with pytest.raises(ValueError):
        File(path=path, sha256="0" * 64, bytes=1, role="report")
    rewrite_manifest(folder, lambda data: data["files"][0].update(path=path))
    (fault,) = faults_of(folder)
    assert fault.startswith("manifest.json: files.0.path")


def test_artifact_outside_the_listed_files_is_refused(folder):
    rewrite_manifest(folder, lambda data: data["artifacts"][0].update(sidecar="../../evil.json"))
    assert any("../../evil.json: named by manifest.json but not among its files" in fault for fault in faults_of(folder))


def test_unknown_format_version_and_no_json(folder):
    rewrite_manifest(folder, lambda data: data.update(format_version=99))
    assert "format_version" in faults_of(folder)[0]
    rewrite_manifest(folder, lambda data: data.update(format_version=FORMAT_VERSION, surprise=1))
    assert "surprise" in faults_of(folder)[0]


def test_links_and_special_files_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "onnx/link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    faults = faults_of(folder)
    assert {fault.split(":")[0] for fault in faults} == {"onnx/link", "linked", "pipe"}


def edited_zip(folder: Path, target: Path, *extra: tuple[zipfile.ZipInfo, bytes]) -> Path:
    zipped(folder, target)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in extra:
            archive.writestr(entry, data)
    return target


@pytest.mark.parametrize("name", [f"{NAME}/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "../evil"])
def test_zip_slip_is_refused_before_unpacking(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading.tempfile, "TemporaryDirectory", lambda **_: pytest.fail("unpacked"))
    archive = edited_zip(folder, tmp_path / "slip.zip", (zipfile.ZipInfo(name), b"evil"))
    (fault,) = faults_of(archive)
    assert "leaves the folder" in fault and "evil" in fault


def test_link_in_a_zip_is_refused(folder, tmp_path):
    entry = zipfile.ZipInfo(f"{NAME}/onnx/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    (fault,) = faults_of(edited_zip(folder, tmp_path / "link.zip", (entry, b"/etc/passwd")))
    assert "onnx/link" in fault and "a link" in fault


def test_file_twice_in_a_zip_is_refused(folder, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = edited_zip(folder, tmp_path / "twice.zip", (zipfile.ZipInfo(f"{NAME}/LICENSE"), b"another"))
    assert faults_of(archive) == ("LICENSE: twice in the zip",)


def test_bomb_is_refused_by_its_declared_size(folder, tmp_path, monkeypatch):
    bomb = zipfile.ZipInfo(f"{NAME}/onnx/bomb")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    enough = 2 * reading.MAX_INFLATION * zipped(folder, tmp_path / "plain.zip").stat().st_size
    archive = edited_zip(folder, tmp_path / "bomb.zip", (bomb, bytes(enough)))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("opened"))
    (fault,) = faults_of(archive)
    assert "200 times" in fault


def test_bomb_that_lies_about_its_size_is_cut_and_named(folder, tmp_path):
    """The directory declares the size that the manifest says; behind it lies a stream a thousand times as long."""
    archive = tmp_path / "lying.zip"
    zipped(folder, archive)
    data = (folder / "LICENSE").read_bytes()
    target = edited_zip(folder, archive)
    with zipfile.ZipFile(target) as opened:
        entry = opened.getinfo(f"{NAME}/LICENSE")
    raw = bytearray(target.read_bytes())
    name_bytes, extra_bytes = struct.unpack_from("<HH", raw, entry.header_offset + 26)
    start = entry.header_offset + 30 + name_bytes + extra_bytes
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = (squeezer.compress(bytes(len(data) * 1000)) + squeezer.flush())[: entry.compress_size]
    raw[start : start + len(stream)] = stream
    target.write_bytes(raw)
    (fault,) = faults_of(target)
    assert fault.startswith("LICENSE: changed") and "unreadable" in fault


def test_what_is_extra_is_not_read_unless_it_may_be_the_missing_file(folder, monkeypatch):
    (folder / "LICENSE").unlink()
    with (folder / "onnx/bomb.bin").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room, and would take an hour to read
    (folder / "litert/small.bin").write_bytes(b"x")
    read_of = verifying.sha256_or_fault
    monkeypatch.setattr(
        verifying, "sha256_or_fault", lambda contents, name: pytest.fail(name) if "bin" in name else read_of(contents, name)
    )
    assert faults_of(folder) == (
        "litert/small.bin: extra, not in the manifest",
        "onnx/bomb.bin: extra, not in the manifest",
        "LICENSE: missing",
    )


def test_a_file_far_longer_than_the_manifest_says_is_not_read(folder):
    with (folder / "onnx/model.onnx").open("r+b") as file:
        file.truncate(1 << 40)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"onnx/model.onnx: {1 << 40} bytes, the manifest says ")


def test_more_files_than_any_bundle_has_are_refused(folder, monkeypatch):
    monkeypatch.setattr(reading, "MAX_FILES", 10)
    assert faults_of(folder)[-1] == f"{len(every_file(folder))} files, which no bundle has"


def test_names_that_would_change_the_terminal_are_shown_as_text(folder, tmp_path):
    (folder / "onnx/\x1b[2Jevil\n").write_text("")
    (fault,) = faults_of(folder)
    assert fault == "'onnx/\\x1b[2Jevil\\n': a name with characters that cannot be shown, which no bundle has"
    (folder / "onnx/\x1b[2Jevil\n").unlink()
    entry = zipfile.ZipInfo(f"{NAME}/onnx/\x1b[2Jevil")
    (fault,) = faults_of(edited_zip(folder, tmp_path / "evil.zip", (entry, b"")))
    assert "\x1b" not in fault and "cannot be shown" in fault


def test_two_names_that_are_one_on_some_systems_are_refused(folder):
    rewrite_manifest(folder, lambda data: data["files"].append({**data["files"][0], "path": data["files"][0]["path"].upper()}))
    (fault,) = faults_of(folder)
    assert fault.startswith("manifest.json: files") and "one file on some systems" in fault


def test_an_unknown_way_of_packing_is_refused(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "bzip2.zip", "w", zipfile.ZIP_BZIP2) as archive:
        for name in every_file(folder):
            archive.write(folder / name, f"{NAME}/{name}")
    assert all("packed by method 12" in fault for fault in faults_of(tmp_path / "bzip2.zip"))


def test_parts_of_a_zip_are_read_as_one_and_what_is_missing_is_named(folder, tmp_path):
    archive = zipped(folder, tmp_path / "bundle.zip")
    parts = split(archive, 50_000)
    archive.unlink()
    assert verify_bundle(parts[0], replay=False).passed and verify_bundle(parts[-1], replay=False).passed
    with bundle_folder(parts[0]) as (place, manifest):
        assert manifest.name == "tiny" and (place / "LICENSE").is_file()
    last = parts[-1].read_bytes()
    parts[-1].unlink()
    with pytest.raises(UserError, match=f"perhaps parts after {parts[-2].name} are missing"):
        verify_bundle(parts[0])
    parts[-1].write_bytes(last)
    parts[1].unlink()
    with pytest.raises(UserError, match="002: this part is missing"):
        verify_bundle(parts[0])


def test_huge_manifest_is_not_read(folder):
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 30)  # sparse: takes no room
    assert faults_of(folder) == (f"manifest.json: {1 << 30} bytes, which no manifest.json has",)


def test_no_bundle_is_the_user_s_mistake(tmp_path):
    with pytest.raises(UserError, match="no such bundle"):
        verify_bundle(tmp_path / "nothing")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(UserError, match="no zip that can be read"):
        verify_bundle(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    assert faults_of(tmp_path / "empty") == ("manifest.json: missing",)


def test_cut_zip_is_the_user_s_mistake_or_a_fault(folder, tmp_path):
    archive = zipped(folder, tmp_path / "cut.zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="no zip that can be read"):
        verify_bundle(archive)


def test_program_may_use_a_bundle_beside_whose_files_others_lie(folder, tmp_path):
    (folder / "result.json").write_text("{}")
    with bundle_folder(folder) as (place, manifest):
        assert place == folder and manifest.name == "tiny"
    with bundle_folder(zipped(folder, tmp_path / "bundle.zip")) as (place, _):
        assert (place / "onnx/model.onnx").is_file() and not (place / "result.json").exists()
    assert not place.exists()
    (folder / "LICENSE").write_text("changed")
    with pytest.raises(GateError, match="LICENSE"), bundle_folder(folder):
        pass


def test_no_room_to_unpack_is_one_line(folder, tmp_path, monkeypatch):
    archive = zipped(folder, tmp_path / "bundle.zip")
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="no room to unpack"), bundle_folder(archive):
        pass
