"""Job stores in both databases."""

import uuid

import pytest
import sqlalchemy

from tests.helpers import postgres


@pytest.fixture(scope="session")
def postgres_server():
    if not postgres.is_here():
        pytest.skip("needs PostgreSQL")
    pytest.importorskip("psycopg")
    server = postgres.Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """The address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    server = request.getfixturevalue("postgres_server")
    name = f"test_{uuid.uuid4().hex}"
    made = sqlalchemy.create_engine(server.url.replace("postgresql:", "postgresql+psycopg:"))
    with made.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    made.dispose()
    return server.url.replace("/postgres?", f"/{name}?")


@pytest.fixture
def store(database_url, tmp_path):
    from sa3dist.serve.job_store import JobStore

    made = JobStore(database_url, tmp_path / "jobs")
    yield made
    made.close()
