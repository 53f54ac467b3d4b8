"""A certificate authority of one's own, for clients that insist on https."""

from pathlib import Path

from sa3dist.errors import ConfigError


def make_certificates(folder: Path, hosts: list[str]) -> tuple[Path, Path]:
    """(authority, server certificate with its key) in ``folder``, made where they are not there for these hosts.

    Raises ConfigError without trustme.
    """
    authority, server, named = folder / "ca.pem", folder / "server.pem", folder / "hosts.txt"
    text = "\n".join(sorted(hosts))
    if server.exists() and named.exists() and named.read_text(encoding="utf-8") == text:
        return authority, server
    try:
        import trustme
    except ModuleNotFoundError as error:
        raise ConfigError("tls: needs trustme; pip install 'sa3dist[serve]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    made = trustme.CA()
    made.cert_pem.write_to_path(authority)
    server.unlink(missing_ok=True)
    server.touch(mode=0o600)
    made.issue_cert(*hosts).private_key_and_cert_chain_pem.write_to_path(server)
    named.write_text(text, encoding="utf-8")
    return authority, server
