"""Quotas: how often and how much one client may upload.

Owns the counters on the client's row, in fixed windows: the minute and the day, UTC. What was
counted stays counted, whatever becomes of the reservation. Must not know uploads.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from app.db import Tx
from app.errors import TooLarge, TooMany
from app.settings import AppSettings
from app.tables import Client

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


def count_call(tx: Tx, client: Client, settings: AppSettings) -> None:
    """Count a reservation or a request for part addresses; the client's row must be locked.

    Raises:
        TooMany: upload_rate.
    """
    minute = tx.now.replace(second=0, microsecond=0)
    if client.minute != minute:
        client.minute, client.minute_calls = minute, 0
    if client.minute_calls >= settings.uploads_per_minute:
        raise TooMany(
            f"more than {settings.uploads_per_minute} uploads announced in a minute; wait",
            code="upload_rate",
            retry_after=_left(tx, minute + MINUTE),
        )
    client.minute_calls += 1


def count_bytes(tx: Tx, client: Client, size: int, settings: AppSettings) -> None:
    """Count the bytes of a newly announced file; the client's row must be locked.

    Raises:
        TooLarge: a day's quota has no room for such a file.
        TooMany: upload_quota.
    """
    most = settings.upload_bytes_per_day
    if size > most:
        raise TooLarge(f"{size} bytes: a client may send {most} a day", code="upload_too_large")
    day = tx.now.replace(hour=0, minute=0, second=0, microsecond=0)
    if client.day != day:
        client.day, client.day_bytes = day, 0
    if client.day_bytes + size > most:
        raise TooMany(
            f"{client.day_bytes} of the {most} bytes a client may send today (UTC) are announced, "
            f"{size} more do not fit; wait for tomorrow, or ask your administrator",
            code="upload_quota",
            retry_after=_left(tx, day + DAY),
        )
    client.day_bytes += size


def _left(tx: Tx, until: datetime) -> int:
    return max(1, math.ceil((until - tx.now).total_seconds()))
