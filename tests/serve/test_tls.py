"""The authority that --tls makes, and the certificate that it signs."""

import socket
import ssl

import pytest
from cryptography import x509

from sa3dist.commands import serve as command
from sa3dist.errors import ConfigError
from sa3dist.serve import app, monitoring
from sa3dist.serve.tls import make_certificates


def certificate_of(server):
    content = server.read_bytes()
    return x509.load_pem_x509_certificate(content[content.index(b"-----BEGIN CERT") :])


def names_of(server):
    names = certificate_of(server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def test_the_certificate_names_this_machine_and_all_of_its_loopback_addresses(tmp_path, monkeypatch):
    def end(*rest):
        raise ConfigError("the certificates are made")

    monkeypatch.setattr(app, "create_app", end)
    monkeypatch.setattr(monitoring, "log_as_json", lambda: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "studio")
    assert command.main(["--tls", "--port", "8765", "--state", str(tmp_path)]) == 2
    assert names_of(tmp_path / "tls/server.pem") >= {"localhost", "127.0.0.1", "::1", "studio", "queue.fal.run"}


def test_authority_and_certificate_are_kept_and_a_further_name_is_signed_by_the_same_authority(tmp_path):
    authority, server = make_certificates(tmp_path / "tls", ["localhost", "::1"])
    first = authority.read_bytes(), server.read_bytes()
    make_certificates(tmp_path / "tls", ["localhost"])
    assert (authority.read_bytes(), server.read_bytes()) == first
    make_certificates(tmp_path / "tls", ["container-2"])
    assert authority.read_bytes() == first[0]
    assert names_of(server) == {"localhost", "::1", "container-2"}
    # OpenSSL takes key and certificate as a pair.
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(server)
    certificate_of(server).verify_directly_issued_by(x509.load_pem_x509_certificate(first[0]))


@pytest.mark.parametrize("name", ["my_host", "-studio", "x" * 70])
def test_a_host_whose_name_no_certificate_can_hold_is_served_under_its_other_names(name, tmp_path):
    _, server = make_certificates(tmp_path / "tls", ["localhost", name])
    assert names_of(server) == {"localhost"}


def test_keys_are_readable_by_their_owner_alone(tmp_path):
    make_certificates(tmp_path / "tls", ["localhost"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "tls").iterdir()}
    assert modes["server.pem"] == modes["ca-key.pem"] == 0o600
