"""Database tables of the job queue, and transactions, for SQLite and PostgreSQL."""

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
# State of a deleted job. Its row stays for a day, so that every server's snapshot notices.
DELETED = "DELETED"
UNFINISHED = (QUEUED, RUNNING)
FINISHED = (SUCCEEDED, FAILED, CANCELLED)

# Limits an SQLite transaction's wait for another process, and the duration of a PostgreSQL statement.
BUSY_SECONDS = 20
CONNECT_SECONDS = 5
# Number of the PostgreSQL lock for exclusive transactions; arbitrary, but the same in every server.
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


# Times are seconds since 1970 by the database's clock.
jobs = Table(
    "jobs",
    metadata,
    # In order of arrival. Clients see ``id``.
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
    *(Column(name, Text) for name in ("dedup", "webhook", "host", "executor", "stage")),
    Column("exit_code", Integer),
    # ``revision`` counts changes of the row: ``updated`` may be equal for two of them.
    *_counts("cancel", "fence", "attempts", "failures", "step", "revision"),
    *_values("devices", "error", "result"),
    *_times("created", "updated", nullable=False),
    *_times("start_until", "lease_until", "not_before", "started", "finished"),
    # Time to keep it after its end, if its client asked for one.
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
    # None: delivered or given up.
    *_times("next_try", index=True),
    *_times("delivered"),
)


class DatabaseAway(EnvironmentFailure):
    """The database does not answer or refuses the connection."""


class now(FunctionElement):
    """Seconds since 1970 by the database's clock, at the moment of the statement."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **words: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **words: Any) -> str:
    # Not now(), which is the start of the transaction, before it may have waited for a lock.
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def changed(**values: Any) -> dict[str, Any]:
    """The values of an update of a job: ``values``, and the columns that mark the row as changed."""
    return values | {"updated": now(), "revision": jobs.c.revision + 1}


def end_jobs(connection: sqlalchemy.Connection, condition: Any, state: str, **values: Any) -> list[str]:
    """Set the final state of jobs that meet ``condition``; returns their ids.

    Rows for webhooks are written in the same transaction, so that none is lost and none is wrong.
    """
    final = changed(state=state, finished=now(), lease_until=None, **values)
    ended = connection.execute(jobs.update().where(condition).values(final).returning(jobs.c.id, jobs.c.webhook)).all()
    for job_id, url in ended:
        if url is not None:
            row = {"job_id": job_id, "url": url, "created": now(), "next_try": now()}
            connection.execute(deliveries.insert().values(row))
    return [job_id for job_id, _ in ended]


class Database:
    """Connections to the database of the queue. Creates the tables if they do not exist.

    folder_of_file   folder of the SQLite file; None for PostgreSQL
    Raises ConfigError for an invalid address, DatabaseAway.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self.folder_of_file = None
        if self.is_sqlite:
            self.folder_of_file = Path(self._engine.url.database).absolute().parent
            self.folder_of_file.mkdir(parents=True, exist_ok=True)
        # Exclusive: servers that start at the same time would create them twice.
        with self.writing(alone=True) as connection:
            metadata.create_all(connection)

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlalchemy.Connection]:
        """A read transaction, which does not wait for writers. Raises DatabaseAway."""
        with _explained(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, alone: bool = False) -> Iterator[sqlalchemy.Connection]:
        """A write transaction. Raises DatabaseAway, after which it may or may not have been committed.

        alone   exclusive among all servers; in SQLite every write transaction is
        """
        connect = self._engine.connect
        with _explained(), connect().execution_options(sa3dist_writes=True) as connection, connection.begin():
            if alone and not self.is_sqlite:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ADVISORY_LOCK})
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError) as failure:
        raise DatabaseAway(f"database: {first_line(failure.orig or failure)}") from failure
    except DBAPIError as failure:
        # SQLite raises exactly this class for a file that is damaged or not a database.
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
            f"database: {address!r} is not an address; expected sqlite:///FILE or postgresql://..."
        ) from error
    if name == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigError("database: sqlite needs a file, because several processes use it: sqlite:///FILE")
        engine = sqlalchemy.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if name not in ("postgresql", "postgres"):
        raise ConfigError(f"database: {name} is not supported; expected sqlite:///FILE or postgresql://...")
    options = {
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": 1000 * BUSY_SECONDS,
        "options": f"-c statement_timeout={1000 * BUSY_SECONDS}",
    }
    try:
        # pool_pre_ping: detects connections that a restarted server has closed.
        return sqlalchemy.create_engine(
            url.set(drivername="postgresql+psycopg"), connect_args=options, pool_pre_ping=True, pool_size=10
        )
    except ModuleNotFoundError as error:
        raise ConfigError("database: PostgreSQL needs psycopg; pip install 'sa3dist[postgres]'") from error


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # Disable the driver's implicit transactions: ``_begin_sqlite`` begins them.
    connection.isolation_level = None
    # WAL: readers do not wait for the writer. FULL: committed jobs survive a power cut.
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sqlalchemy.Connection) -> None:
    # A transaction that reads and then writes could fail to get the write lock, so write transactions take it at the
    # start. Read transactions do not, to avoid waiting for writers.
    writes = connection.get_execution_options().get("sa3dist_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
