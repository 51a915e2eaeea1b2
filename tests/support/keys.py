"""Key pairs, as files for the command line and the library."""

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

__all__ = ["KeyPair", "key_pair", "write_keys"]


class KeyPair(NamedTuple):
    private: Path
    public: Path


def key_pair(folder: Path, name: str = "key", password: bytes | None = None) -> KeyPair:
    """Create a P-256 key pair; model-signing's own documentation uses this curve."""
    return write_keys(ec.generate_private_key(ec.SECP256R1()), folder, name, password)


def write_keys(key: ec.EllipticCurvePrivateKey, folder: Path, name: str, password: bytes | None = None) -> KeyPair:
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub")
    locked: KeySerializationEncryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    pair.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    pair.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return pair
