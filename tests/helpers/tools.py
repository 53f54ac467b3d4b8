"""Programs and packages that a test needs beside the suite's own: without them it is skipped, or fails where asked."""

import os

import pytest


def need(is_there: object, what: str) -> None:
    """Skip the test without ``what``; under SA3_REQUIRE_TOOLS=1 that is a failure."""
    if not is_there:
        say = pytest.fail if os.environ.get("SA3_REQUIRE_TOOLS") == "1" else pytest.skip
        say(f"needs {what}: make test-services installs it")
