"""A certificate authority of one's own, for clients that insist on https."""

import contextlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from sa3dist.errors import ConfigError


def make_certificates(folder: Path, hosts: Iterable[str]) -> tuple[Path, Path]:
    """(authority, server certificate with its key) in ``folder``; what is there already is kept.

    The authority is made once. The certificate is made again only if it lacks one of ``hosts``; names that no
    certificate can hold, such as ``my_host``, are left out.
    Raises ConfigError without trustme.
    """
    authority, key, server, named = (folder / name for name in ("ca.pem", "ca-key.pem", "server.pem", "hosts.txt"))
    known = set(named.read_text(encoding="utf-8").split("\n")) if server.exists() and named.exists() else set()
    if known >= set(hosts):
        return authority, server
    try:
        import trustme
    except ModuleNotFoundError as error:
        raise ConfigError("tls: needs trustme; pip install 'sa3dist[serve]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    if authority.exists() and key.exists():
        made = trustme.CA.from_pem(authority.read_bytes(), key.read_bytes())
    else:
        made = trustme.CA()
        _write_private(key, made.private_key_pem)
        made.cert_pem.write_to_path(authority)
    names = sorted(known | set(hosts))
    _write_private(server, made.issue_cert(*filter(_can_be_certified, names)).private_key_and_cert_chain_pem)
    named.write_text("\n".join(names), encoding="utf-8")
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
