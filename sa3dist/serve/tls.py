"""A private certificate authority, for clients that require https."""

import contextlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from sa3dist.errors import ConfigError


def make_certificates(folder: Path, hosts: Iterable[str]) -> tuple[Path, Path]:
    """(authority, server certificate with its key) in ``folder``; existing ones are kept.

    The authority is created once, the certificate again only if it lacks one of ``hosts``. Names that are not allowed
    in certificates, such as ``my_host``, are left out.
    Raises ConfigError without trustme.
    """
    authority, key, server, hosts_file = (folder / name for name in ("ca.pem", "ca-key.pem", "server.pem", "hosts.txt"))
    exists = server.exists() and hosts_file.exists()
    known = set(hosts_file.read_text(encoding="utf-8").split("\n")) if exists else set()
    if known >= set(hosts):
        return authority, server
    try:
        import trustme
    except ModuleNotFoundError as error:
        raise ConfigError("tls: needs trustme; pip install 'sa3dist[serve]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    if authority.exists() and key.exists():
        ca = trustme.CA.from_pem(authority.read_bytes(), key.read_bytes())
    else:
        ca = trustme.CA()
        _write_private(key, ca.private_key_pem)
        ca.cert_pem.write_to_path(authority)
    names = sorted(known | set(hosts))
    _write_private(server, ca.issue_cert(*filter(_can_be_certified, names)).private_key_and_cert_chain_pem)
    hosts_file.write_text("\n".join(names), encoding="utf-8")
    return authority, server


def _write_private(path: Path, content) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    content.write_to_path(path)


def _can_be_certified(host: str) -> bool:
    import idna

    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    with contextlib.suppress(UnicodeError):
        return bool(idna.encode(host, uts46=True))
    return False
