"""Webhooks that are to be delivered: a row each, written with the end of its job, tried until it arrives."""

import dataclasses

from sqlalchemy import select

from sa3dist.serve.tables import Database, deliveries, now


@dataclasses.dataclass(frozen=True)
class Delivery:
    """One webhook. tries: how many there were, the one that ``due`` hands out included."""

    id: int
    job_id: str
    url: str
    created: float
    tries: int


class Outbox:
    """The webhooks of one database. Every method may raise DatabaseAway.

    At least once: a server that is killed between the delivery and ``delivered`` leaves it to be made again.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, seconds: float, limit: int = 20) -> list[Delivery]:
        """Deliveries that are to be tried now. Nobody else is given them within ``seconds``, the time one try takes."""
        with self._database.writing(alone=True) as connection:
            ready = select(deliveries.c.id).where(deliveries.c.next_try <= now())
            ready = ready.order_by(deliveries.c.next_try).limit(limit)
            ids = list(connection.scalars(ready))
            if not ids:
                return []
            columns = [deliveries.c[field.name] for field in dataclasses.fields(Delivery)]
            taken = deliveries.update().where(deliveries.c.id.in_(ids))
            taken = taken.values(next_try=now() + seconds, tries=deliveries.c.tries + 1).returning(*columns)
            return [Delivery(**row._mapping) for row in connection.execute(taken)]

    def delivered(self, delivery: Delivery) -> None:
        """It has arrived."""
        self._update(delivery, delivered=now(), next_try=None, error=None)

    def failed(self, delivery: Delivery, error: str, again_seconds: float | None) -> None:
        """It has not arrived. again_seconds: until the next try; None: it is given up."""
        self._update(delivery, error=error, next_try=None if again_seconds is None else now() + again_seconds)

    def _update(self, delivery: Delivery, **values) -> None:
        with self._database.writing() as connection:
            connection.execute(deliveries.update().where(deliveries.c.id == delivery.id).values(values))
