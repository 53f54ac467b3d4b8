"""Webhooks to deliver: one row each, written when a job ends, retried until it is delivered."""

import dataclasses

from sqlalchemy import select

from sa3dist.serve.tables import Database, deliveries, now


@dataclasses.dataclass(frozen=True)
class Delivery:
    """One webhook. tries: number of tries, including the current one."""

    id: int
    job_id: str
    url: str
    created: float
    tries: int


class Outbox:
    """The webhooks of one database. Every method may raise DatabaseAway.

    Delivery is at least once: if a server is killed before ``delivered``, it is repeated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, seconds: float, limit: int = 20) -> list[Delivery]:
        """Deliveries to try now. No other server gets them for ``seconds``, the duration of one try."""
        with self._database.writing(alone=True) as connection:
            ready = select(deliveries.c.id).where(deliveries.c.next_try <= now())
            ready = ready.order_by(deliveries.c.next_try).limit(limit)
            ids = list(connection.scalars(ready))
            if not ids:
                return []
            columns = [deliveries.c[field.name] for field in dataclasses.fields(Delivery)]
            claim = deliveries.update().where(deliveries.c.id.in_(ids))
            claim = claim.values(next_try=now() + seconds, tries=deliveries.c.tries + 1).returning(*columns)
            return [Delivery(**row._mapping) for row in connection.execute(claim)]

    def delivered(self, delivery: Delivery) -> None:
        """Record a successful delivery."""
        self._update(delivery, delivered=now(), next_try=None, error=None)

    def failed(self, delivery: Delivery, error: str, again_seconds: float | None) -> None:
        """Record a failed delivery. again_seconds: time until the next try; None: give up."""
        self._update(delivery, error=error, next_try=None if again_seconds is None else now() + again_seconds)

    def _update(self, delivery: Delivery, **values) -> None:
        with self._database.writing() as connection:
            connection.execute(deliveries.update().where(deliveries.c.id == delivery.id).values(values))
