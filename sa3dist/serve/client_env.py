"""Point the Python client at your own server, for notebooks."""

import importlib
import os


def fal_env(url: str = "http://127.0.0.1:8000", key: str = "local:none", authority: str | None = None) -> None:
    """Make ``fal_client`` use the server at ``url`` (http or https), even if it is already imported.

    key         as printed by ``sa3dist serve keys add``; any text for a server that needs none
    authority   ca.pem of a server started with --tls
    """
    scheme, _, host = url.rstrip("/").partition("://")
    os.environ |= {"FAL_RUN_HOST": f"{host}/run", "FAL_QUEUE_RUN_HOST": host, "FAL_KEY": key}
    if authority is not None:
        os.environ["SSL_CERT_FILE"] = authority

    client = importlib.import_module("fal_client.client")
    client.RUN_URL_FORMAT, client.QUEUE_URL_FORMAT = f"{scheme}://{host}/run/", f"{scheme}://{host}/"
    client.REST_URL, client.CDN_URL = f"{scheme}://{host}/rest", f"{scheme}://{host}"
