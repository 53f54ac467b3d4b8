"""Who calls: keys with scopes, kept as hashes, and the secret that signs links, upload tokens and webhooks."""

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
# A client refreshes its upload token by itself before this is over.
TOKEN_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Caller:
    """The id of a key and what it may do: ``submit`` and see its own, ``admin`` see everybody's."""

    id: str
    is_admin: bool = False

    def may_see(self, owner: str) -> bool:
        """Whether what the key ``owner`` made is visible."""
        return self.is_admin or self.id == owner


# Who calls a server that needs no keys.
LOCAL = Caller("local", is_admin=True)


class Keys:
    """The keys in a data folder. A change takes effect at once, in every server that has the folder."""

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
        """Make a key; the only time that it is told."""
        made, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        entry = {"name": name, "scope": scope, "sha256": _sha256(secret), "created": time.time()}
        with self._alone():
            self._write(self.read() | {made: entry})
        return f"{made}:{secret}"

    def remove(self, key_id: str) -> None:
        """Raises ConfigError for one that is not there."""
        with self._alone():
            kept = dict(self.read())
            if kept.pop(key_id, None) is None:
                raise ConfigError(f"keys: no key {printable(key_id)}; sa3dist serve keys list shows all")
            self._write(kept)

    def caller(self, key: str) -> Caller | None:
        """Whose key this is."""
        key_id, _, secret = key.partition(":")
        entry = self.read().get(key_id)
        # An unknown id costs as much as a wrong secret.
        fits = hmac.compare_digest(_sha256(secret), entry["sha256"] if entry else "0" * 64)
        return Caller(key_id, entry["scope"] == "admin") if entry and fits else None

    def _alone(self):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return alone(self._path.with_suffix(".lock"), lambda: None)

    def _write(self, keys: dict[str, dict]) -> None:
        write_json(self._path, keys)
        self._path.chmod(0o600)


def _sha256(text: str) -> str:
    # A plain hash: the secrets are 256 random bits, which nobody can try out.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


class Signer:
    """Signatures of one data folder: of links and upload tokens (HMAC-SHA-256), and of webhooks (Ed25519)."""

    def __init__(self, folder: Path) -> None:
        self._secret = _kept_secret(Path(folder) / SECRET_NAME)
        self.webhook_key = Ed25519PrivateKey.from_private_bytes(self._mac("webhooks", b""))

    def sign(self, purpose: str, words: Iterable[object], expires: int) -> str:
        """A signature for ``purpose`` alone."""
        return self._mac(purpose, "\n".join([*map(str, words), str(expires)]).encode(errors="replace")).hex()

    def fits(self, purpose: str, words: Iterable[object], expires: str, signature: str) -> bool:
        """Whether ``sign`` made this signature and its time is not over."""
        if not (expires.isascii() and expires.isdecimal() and len(expires) < 16) or int(expires) < time.time():
            return False
        expected = self.sign(purpose, words, int(expires))
        return hmac.compare_digest(expected.encode(), signature.encode(errors="replace"))

    def token(self, caller: Caller) -> tuple[str, int]:
        """A token with which ``caller`` may upload, and when it ends."""
        expires = int(time.time()) + TOKEN_SECONDS
        return f"upload.{caller.id}.{expires}.{self.sign('token', [caller.id], expires)}", expires

    def token_caller(self, token: str, known: Collection[str]) -> Caller | None:
        """Who was given this upload token. known: ids of the keys that there are now."""
        kind, _, rest = token.partition(".")
        key_id, _, rest = rest.partition(".")
        expires, _, signature = rest.partition(".")
        fits = kind == "upload" and self.fits("token", [key_id], expires, signature)
        return Caller(key_id) if fits and key_id in known else None

    def _mac(self, purpose: str, text: bytes) -> bytes:
        return hmac.digest(self._secret, purpose.encode() + b"\0" + text, "sha256")


def _kept_secret(path: Path) -> bytes:
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
        raise ConfigError(f"{path}: damaged; restore it, or remove it, which ends all links made before") from error
