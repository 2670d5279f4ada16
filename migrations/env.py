"""Runs migrations under an advisory lock, with a short lock timeout so that nobody is held up."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, make_url, pool, text

from app.settings import DatabaseSettings
from app.tables import Table
from migrations.grants import grant

ADVISORY_LOCK = 0x5EED_0000


def run() -> None:
    """Migrate as the role that owns the tables, in one transaction per migration; then grant."""
    settings = DatabaseSettings()  # type: ignore[call-arg]
    engine = create_engine(settings.owner_url.get_secret_value(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:n)"), {"n": ADVISORY_LOCK})
        connection.execute(text("SET lock_timeout = '10s'"))
        connection.commit()
        context.configure(
            connection=connection,
            target_metadata=Table.metadata,
            transaction_per_migration=True,
            compare_server_default=True,
        )
        with context.begin_transaction():
            context.run_migrations()
        if context.get_head_revision() == context.get_context().get_current_revision():
            grant(connection, make_url(settings.database_url.get_secret_value()))
            connection.commit()


run()
