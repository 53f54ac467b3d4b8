"""Tables of the job queue, and transactions on them, in SQLite and in PostgreSQL."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import JSON, BigInteger, Column, Double, Index, Integer, MetaData, String, Table, Text, event
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from sa3dist.errors import ConfigError, EnvironmentFailure, first_line

QUEUED, RUNNING = "QUEUED", "RUNNING"
SUCCEEDED, FAILED, CANCELLED = "SUCCEEDED", "FAILED", "CANCELLED"
# What is left of a deleted job for a day, so that every server's snapshot hears of it.
DELETED = "DELETED"
UNFINISHED = (QUEUED, RUNNING)
FINISHED = (SUCCEEDED, FAILED, CANCELLED)

# How long a transaction of SQLite waits for another process's, and a statement of PostgreSQL may take.
BUSY_SECONDS = 20
CONNECT_SECONDS = 5
# The lock under which PostgreSQL hands out jobs: any number, the same in every server.
ADVISORY_LOCK = 0x5A3D157

metadata = MetaData()


def _number(name: str) -> Column:
    return Column(name, BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


def _counts(*names: str) -> list[Column]:
    return [Column(name, Integer, nullable=False, default=0) for name in names]


def _times(*names: str, **words: Any) -> list[Column]:
    return [Column(name, Double, **words) for name in names]


def _values(*names: str) -> list[Column]:
    return [Column(name, JSON(none_as_null=True)) for name in names]


# Ends of rows are numbers of seconds since 1970 by the database's clock.
jobs = Table(
    "jobs",
    metadata,
    # The order of arrival. ``id`` is what clients see.
    _number("number"),
    Column("id", String(32), nullable=False, unique=True),
    Column("app", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("request", JSON, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("state", String(9), nullable=False),
    *(Column(name, Text) for name in ("dedup", "webhook", "owner", "host", "executor", "stage")),
    Column("exit_code", Integer),
    # ``revision`` counts the changes of the row: two of them may fall into one tick of the clock.
    *_counts("cancel", "fence", "attempts", "failures", "step", "revision"),
    *_values("devices", "error", "result"),
    *_times("created", "updated", nullable=False),
    *_times("start_until", "lease_until", "not_before", "started", "finished"),
    # How long it is kept behind its end, where its client has said so.
    Column("keep_seconds", Double),
    sqlite_autoincrement=True,
)
Index("jobs_by_turn", jobs.c.state, jobs.c.priority, jobs.c.number)
Index("jobs_by_change", jobs.c.updated)
_unfinished = jobs.c.state.in_(UNFINISHED)
Index("jobs_alike", jobs.c.dedup, unique=True, sqlite_where=_unfinished, postgresql_where=_unfinished)

deliveries = Table(
    "deliveries",
    metadata,
    _number("id"),
    Column("job_id", String(32), nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("error", Text),
    *_counts("tries"),
    *_times("created", nullable=False),
    # None: no further try, it has arrived or was given up.
    *_times("next_try", index=True),
    *_times("delivered"),
)


class DatabaseAway(EnvironmentFailure):
    """The database does not answer, or has refused the connection."""


class now(FunctionElement):
    """Seconds since 1970 by the database's clock, at the moment of the statement."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **words: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **words: Any) -> str:
    # Not now(): that one stands still within a transaction, which may have waited for a lock.
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def changed(**values: Any) -> dict[str, Any]:
    """What an update of a job sets: ``values``, and that the row has changed."""
    return values | {"updated": now(), "revision": jobs.c.revision + 1}


def end_jobs(connection: sqlalchemy.Connection, condition: Any, state: str, **values: Any) -> list[str]:
    """Bring the jobs that meet ``condition`` to their final state; their ids.

    A webhook's row is written in the same transaction, so that none is lost and none announces what is not so.
    """
    final = changed(state=state, finished=now(), lease_until=None, **values)
    ended = connection.execute(jobs.update().where(condition).values(final).returning(jobs.c.id, jobs.c.webhook)).all()
    for job_id, url in ended:
        if url is not None:
            row = {"job_id": job_id, "url": url, "created": now(), "next_try": now()}
            connection.execute(deliveries.insert().values(row))
    return [job_id for job_id, _ in ended]


class Database:
    """Connections to the queue's tables, which are made where there are none.

    folder_of_file   where an SQLite file lies; None for PostgreSQL
    Raises ConfigError for an address that is none, DatabaseAway.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self.folder_of_file = None
        if self.is_sqlite:
            self.folder_of_file = Path(self._engine.url.database).absolute().parent
            self.folder_of_file.mkdir(parents=True, exist_ok=True)
        # Alone: servers that start at the same moment would make them twice.
        with self.writing(alone=True) as connection:
            metadata.create_all(connection)

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlalchemy.Connection]:
        """A transaction that waits for no writer. Raises DatabaseAway."""
        with _explained(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, alone: bool = False) -> Iterator[sqlalchemy.Connection]:
        """A transaction that is done as a whole or not at all. Raises DatabaseAway; then it may have been done.

        alone   one such transaction at a time, of all servers; in SQLite every one is
        """
        connect = self._engine.connect
        with _explained(), connect().execution_options(sa3dist_writes=True) as connection, connection.begin():
            if alone and not self.is_sqlite:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ADVISORY_LOCK})
            yield connection

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError) as failure:
        raise DatabaseAway(f"database: {first_line(failure.orig or failure)}") from failure
    except DBAPIError as failure:
        # Exactly this one is what SQLite says of a file that is damaged, or none of its own.
        if type(failure.orig) is sqlite3.DatabaseError:
            reason = f"{failure.orig}; restore the file, or move it away and start with an empty queue"
            raise DatabaseAway(f"database: {reason}") from failure
        if not failure.connection_invalidated:
            raise
        raise DatabaseAway(f"database: {first_line(failure.orig or failure)}") from failure


def _engine(address: str) -> sqlalchemy.Engine:
    try:
        url = sqlalchemy.make_url(address)
        name = url.get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            f"database: {address!r} is no address; expected sqlite:///FILE or postgresql://..."
        ) from error
    if name == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigError("database: sqlite needs a file, several processes use it: sqlite:///FILE")
        engine = sqlalchemy.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if name not in ("postgresql", "postgres"):
        raise ConfigError(f"database: {name} is not supported; expected sqlite:///FILE or postgresql://...")
    # A connection that a restarted server has closed is found out before it is used.
    words = {
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": 1000 * BUSY_SECONDS,
        "options": f"-c statement_timeout={1000 * BUSY_SECONDS}",
    }
    try:
        return sqlalchemy.create_engine(
            url.set(drivername="postgresql+psycopg"), connect_args=words, pool_pre_ping=True, pool_size=10
        )
    except ModuleNotFoundError as error:
        raise ConfigError("database: PostgreSQL needs psycopg; pip install 'sa3dist[postgres]'") from error


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # The driver begins no transactions of its own: ``_begin_sqlite`` does.
    connection.isolation_level = None
    # Readers do not wait for the writer. FULL: what was accepted outlives a power cut.
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sqlalchemy.Connection) -> None:
    # A transaction that reads first and writes later could not be given the lock any more: it takes it at its start.
    # One that only reads would then wait for the writers.
    writes = connection.get_execution_options().get("sa3dist_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
