"""Signatures: made and checked by the bundle's own code and by openssl, refused where anything about them is wrong."""

import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from models.errors import UserError
from pipeline.bundle import build_bundle
from pipeline.bundle_files import BundleInputs, BundleOptions
from pipeline.report import build_report
from pipeline.signing import key_sha256, read_private_key, read_public_key
from pipeline.tests.fake_road import fake_outcome, fake_recipe, fake_road, fake_stages
from pipeline.verify import verify_bundle
from pipeline.zip_folder import write_zip

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    root = tmp_path_factory.mktemp("signed")
    road = fake_road(root / "road")
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key", BundleOptions(key=KEY)), root / "dist").folder


@pytest.fixture
def folder(signed, tmp_path):
    return shutil.copytree(signed, tmp_path / "tiny-android-bundle")


def pem(key, path, password=None):
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path, public


def faults(path, key=None) -> tuple[str, ...]:
    return verify_bundle(path, replay=False, key=key).faults


def test_a_signed_bundle_is_checked_with_its_key_as_folder_and_zip(folder, tmp_path):
    write_zip(folder, tmp_path / "bundle.zip", folder.name)
    for path in (folder, tmp_path / "bundle.zip"):
        found = verify_bundle(path, replay=False, key=KEY.public_key())
        assert found.passed and found.signature == "checked"
        assert verify_bundle(path, replay=False).signature == "unchecked"
    assert (
        "openssl pkeyutl -verify" in (folder / "README.md").read_text()
        and key_sha256(KEY.public_key()) in (folder / "README.md").read_text()
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_checks_the_same_signature_and_names_the_same_key(folder, tmp_path):
    _, public = pem(KEY, tmp_path / "key.pem")
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin", "-in", "SHA256SUMS", "-sigfile", "SHA256SUMS.sig"]
    assert subprocess.run(check, cwd=folder, capture_output=True, check=False).returncode == 0
    (folder / "SHA256SUMS").write_text("changed")
    assert subprocess.run(check, cwd=folder, capture_output=True, check=False).returncode != 0
    der = subprocess.run(["openssl", "pkey", "-pubin", "-in", str(public), "-outform", "DER"], capture_output=True, check=True).stdout
    digest = subprocess.run(["sha256sum"], input=der, capture_output=True, check=True).stdout.decode().split()[0]
    assert digest == key_sha256(KEY.public_key())


def test_another_key_is_refused(folder):
    (fault,) = faults(folder, OTHER.public_key())
    assert fault.startswith("SHA256SUMS.sig: not made with the key")


def test_an_unsigned_bundle_is_refused_where_a_key_is_given(folder):
    (folder / "SHA256SUMS.sig").unlink()
    (fault,) = faults(folder, KEY.public_key())
    assert fault.startswith("SHA256SUMS.sig: missing")


def test_a_signature_that_was_taken_away_is_missed_without_a_key_too(folder):
    (folder / "SHA256SUMS.sig").unlink()
    (fault,) = faults(folder)
    assert fault == "SHA256SUMS.sig: manifest.json says that the bundle is signed, but the signature is missing"


@pytest.mark.parametrize("data", [b"", bytes(63), bytes(65), bytes(1 << 20)])
def test_a_signature_of_another_length_is_refused(folder, data):
    (folder / "SHA256SUMS.sig").write_bytes(data)
    for key in (None, KEY.public_key()):
        (fault,) = faults(folder, key)
        assert fault == f"SHA256SUMS.sig: {len(data)} bytes, a signature has 64"


def test_a_changed_byte_of_sums_or_signature_breaks_it(folder):
    for name in ("SHA256SUMS", "SHA256SUMS.sig"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        (fault,) = faults(folder, KEY.public_key())
        assert fault.startswith("SHA256SUMS.sig: not made with the key")
        (folder / name).write_bytes(whole)
    assert faults(folder, KEY.public_key()) == ()


def test_keys_are_read_from_pem_and_bad_ones_are_one_line(tmp_path):
    private, public = pem(KEY, tmp_path / "key.pem")
    assert key_sha256(read_private_key(private).public_key()) == key_sha256(read_public_key(public)) == key_sha256(KEY.public_key())
    elliptic, elliptic_public = pem(generate_private_key(SECP256R1()), tmp_path / "ec.pem")
    locked, _ = pem(KEY, tmp_path / "locked.pem", password=b"secret")
    (tmp_path / "text").write_text("no key")
    (tmp_path / "large").write_bytes(bytes(1 << 17))
    for path, words in (
        (tmp_path / "none", "cannot be read"), (tmp_path / "text", "no private key in PEM"), (public, "no private key in PEM"),
        (elliptic, "another kind than Ed25519"), (locked, "encrypted"), (tmp_path / "large", "larger than any key"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            read_private_key(path)
        assert str(caught.value).startswith(f"--sign {path}: ") and "\n" not in str(caught.value)
    for path, words in ((private, "no public key in PEM"), (elliptic_public, "another kind"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(UserError, match=words):
            read_public_key(path)
