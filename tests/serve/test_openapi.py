"""Every route of /openapi.json with inputs drawn from its own description: no answer is a failure of the server."""

import contextlib
import importlib.util
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from starlette.testclient import TestClient

from tests.helpers.endpoint import PATH, REQUEST, application, listening
from tests.helpers.tools import need

pytestmark = pytest.mark.slow
EXAMPLES = 30
QUIET = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_no_input_that_the_description_allows_or_forbids_is_a_failure(tmp_path):
    need(importlib.util.find_spec("schemathesis"), "schemathesis")
    import schemathesis
    from schemathesis.checks import not_a_server_error

    owner, name = PATH.strip("/").split("/")
    counts: dict[str, int] = {}
    with application(tmp_path) as (app, _):
        with TestClient(app) as client:
            made = client.post(PATH, json=REQUEST).json()
            client.put(made["cancel_url"])
            upload = client.post("/files/upload/multipart").json()
        known = {"owner": owner, "name": name, "job_id": made["request_id"], "upload_id": upload["uploadId"]}

        def send(case) -> None:
            counts[case.path] = counts.get(case.path, 0) + 1
            # Drawn words alone would never get past the first look at an address.
            if counts[case.path] % 4:
                case.path_parameters.update({key: known[key] for key in case.path_parameters.keys() & known})
            address = case.body.get("audio_data_url") if isinstance(case.body, dict) else None
            # Nobody trains here: what is accepted would not end.
            if not (
                case.path.startswith("/run") and isinstance(address, str) and address[:4].lower() in ("http", "data")
            ):
                case.validate_response(case.call(timeout=30), checks=[not_a_server_error])

        with listening(app) as port:
            schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
            for found in schema.get_all_operations():
                QUIET(given(found.ok().as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))(send))()
                # To a route that takes nothing, nothing wrong can be sent.
                with contextlib.suppress(Unsatisfiable):
                    QUIET(given(found.ok().as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))(send))()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
                assert answer.status == 200
    assert counts.keys() >= {"/{owner}/{name}", "/files/{name}", "/run/{owner}/{name}", "/healthz"}
