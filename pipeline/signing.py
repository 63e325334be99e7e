"""Signs a bundle's ``SHA256SUMS`` and checks the signature: Ed25519 (RFC 8032), keys as PEM, by the cryptography package.

The signature file holds the 64 bytes as they are, so that openssl checks it too:
``openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig``.
"""

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key, load_pem_public_key

from models.errors import UserError

SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 1 << 16
MAKE_PRIVATE = "make one with: openssl genpkey -algorithm ed25519 -out key.pem"
MAKE_PUBLIC = "make one with: openssl pkey -in key.pem -pubout -out public.pem"


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key that signs. UserError when the file holds no Ed25519 private key in PEM, or asks for a password."""
    data = read_key_file(path, "--sign", MAKE_PRIVATE)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:  # what cryptography raises for an encrypted key without a password
        raise UserError(f"--sign {path}: the key is encrypted; give it without a password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"--sign {path}: no private key in PEM; {MAKE_PRIVATE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"--sign {path}: a key of another kind than Ed25519; {MAKE_PRIVATE}")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The key that checks. UserError when the file holds no Ed25519 public key in PEM."""
    data = read_key_file(path, "--key", MAKE_PUBLIC)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"--key {path}: no public key in PEM; {MAKE_PUBLIC}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"--key {path}: a key of another kind than Ed25519; {MAKE_PUBLIC}")
    return key


def read_key_file(path: Path, option: str, remedy: str) -> bytes:
    """The bytes of a key file, which is small."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); {remedy}") from error
    if len(data) > MAX_KEY_BYTES:
        raise UserError(f"{option} {path}: larger than any key; {remedy}")
    return data


def key_sha256(key: Ed25519PublicKey) -> str:
    """SHA-256 of the public key in DER: what ``openssl pkey -pubin -in public.pem -outform DER | sha256sum`` says."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def made_by(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    """Whether ``signature`` over ``signed`` was made with the private half of ``key``."""
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True
