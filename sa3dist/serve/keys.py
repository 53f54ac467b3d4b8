"""API keys with scopes, stored as hashes; and the secret that signs links, upload tokens and webhooks."""

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sa3dist.errors import ConfigError, printable
from sa3dist.formats import write_json
from sa3dist.runtime.file_lock import alone

SCOPES = ("submit", "admin")
KEYS_NAME, SECRET_NAME = "keys.json", "secret"
# Clients refresh their upload tokens before they expire.
TOKEN_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Caller:
    """The id of a key, and whether it is an admin's: others see only their own jobs and files."""

    id: str
    is_admin: bool = False

    def may_see(self, owner: str) -> bool:
        """Whether jobs and files of the key ``owner`` are visible."""
        return self.is_admin or self.id == owner


# The caller of a server that needs no keys.
LOCAL = Caller("local", is_admin=True)


class Keys:
    """The keys in a data folder. Changes take effect at once in every server that uses the folder."""

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / KEYS_NAME
        self._seen: tuple[int, int] | None = None
        self._known: dict[str, dict] = {}

    def read(self) -> dict[str, dict]:
        """``{id: {name, scope, sha256, created}}``. Raises ConfigError for a damaged file."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return {}
        if self._seen != (status.st_mtime_ns, status.st_size):
            try:
                self._known = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{self._path}: damaged ({error}); restore it, or make new keys") from error
            self._seen = (status.st_mtime_ns, status.st_size)
        return self._known

    def add(self, name: str, scope: str) -> str:
        """Create a key and return it. It cannot be shown again."""
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        entry = {"name": name, "scope": scope, "sha256": _sha256(secret), "created": time.time()}
        with self._lock():
            self._write(self.read() | {key_id: entry})
        return f"{key_id}:{secret}"

    def remove(self, key_id: str) -> None:
        """Remove a key. Raises ConfigError if it does not exist."""
        with self._lock():
            keys = dict(self.read())
            if keys.pop(key_id, None) is None:
                raise ConfigError(f"keys: no key {printable(key_id)}; sa3dist serve keys list shows all")
            self._write(keys)

    def caller(self, key: str) -> Caller | None:
        """The owner of a key; None if it is invalid."""
        key_id, _, secret = key.partition(":")
        entry = self.read().get(key_id)
        # Compare always: an unknown id must take as long as a wrong secret.
        fits = hmac.compare_digest(_sha256(secret), entry["sha256"] if entry else "0" * 64)
        return Caller(key_id, entry["scope"] == "admin") if entry and fits else None

    def _lock(self):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return alone(self._path.with_suffix(".lock"), lambda: None)

    def _write(self, keys: dict[str, dict]) -> None:
        write_json(self._path, keys)
        self._path.chmod(0o600)


def _sha256(text: str) -> str:
    # A plain hash is enough: the secrets are 256 random bits, which cannot be guessed.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


class Signer:
    """Signs links and upload tokens (HMAC-SHA-256) and webhooks (Ed25519) with the secret of a data folder."""

    def __init__(self, folder: Path) -> None:
        self._secret = _load_or_create_secret(Path(folder) / SECRET_NAME)
        self.webhook_key = Ed25519PrivateKey.from_private_bytes(self._mac("webhooks", b""))

    def sign(self, purpose: str, words: Iterable[object], expires: int) -> str:
        """A signature that is valid only for ``purpose``."""
        return self._mac(purpose, "\n".join([*map(str, words), str(expires)]).encode(errors="replace")).hex()

    def fits(self, purpose: str, words: Iterable[object], expires: str, signature: str) -> bool:
        """Whether ``sign`` made this signature and it has not expired."""
        if not (expires.isascii() and expires.isdecimal() and len(expires) < 16) or int(expires) < time.time():
            return False
        expected = self.sign(purpose, words, int(expires))
        return hmac.compare_digest(expected.encode(), signature.encode(errors="replace"))

    def token(self, caller: Caller) -> tuple[str, int]:
        """A token with which ``caller`` may upload, and when it expires."""
        expires = int(time.time()) + TOKEN_SECONDS
        return f"upload.{caller.id}.{expires}.{self.sign('token', [caller.id], expires)}", expires

    def token_caller(self, token: str, known: Collection[str]) -> Caller | None:
        """The caller of a valid upload token, else None. known: ids of existing keys."""
        kind, _, rest = token.partition(".")
        key_id, _, rest = rest.partition(".")
        expires, _, signature = rest.partition(".")
        fits = kind == "upload" and self.fits("token", [key_id], expires, signature)
        return Caller(key_id) if fits and key_id in known else None

    def _mac(self, purpose: str, text: bytes) -> bytes:
        return hmac.digest(self._secret, purpose.encode() + b"\0" + text, "sha256")


def _load_or_create_secret(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.with_suffix(".lock"), lambda: None):
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            os.replace(temporary, path)
    try:
        return bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError as error:
        raise ConfigError(f"{path}: damaged; restore it, or remove it, which invalidates all earlier links") from error
