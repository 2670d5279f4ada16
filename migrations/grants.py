"""What the service may do with the tables, which belong to another role.

Owns the grants: reading and writing everywhere, but of what is written once only reading and
adding, and deleting only what retention and erasure take away, deliveries that have ended and what
helps a round until it ends. Whoever runs the service can neither change the past nor take the
triggers away. Applied after every migration; nothing happens where one role does both.
"""

from __future__ import annotations

from sqlalchemy import Connection, text
from sqlalchemy.engine import URL

APPEND_ONLY = ("ledger_entries", "ledger_seals", "ledger_checkpoints", "transitions", "manifests")
DELETABLE = (
    *("ablations", "deliveries", "evaluations", "idempotent_answers", "objects"),
    "partial_sums",
)
RIGHTS = """
    GRANT USAGE ON SCHEMA public TO {role};
    GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role};
    REVOKE DELETE ON ALL TABLES IN SCHEMA public FROM {role};
    GRANT DELETE ON {deletable} TO {role};
    REVOKE UPDATE ON {append_only} FROM {role};
    REVOKE INSERT, UPDATE ON alembic_version FROM {role}"""


def grant(connection: Connection, service: URL) -> None:
    """Let the role of this address use the tables; it is made, with its password, if there is none.

    Raises:
        RuntimeError: the role is missing and ours may not make roles, or it could undo the grants.
    """
    name = service.username or ""
    if name == connection.scalar(text("SELECT current_user")):
        return
    quote = connection.dialect.identifier_preparer.quote_identifier
    role = quote(name)
    found = connection.execute(
        text("SELECT rolsuper OR rolcreaterole, rolname FROM pg_roles WHERE rolname = :name"),
        {"name": name},
    ).first()
    if found is None:
        _create(connection, role, str(service.password or ""))
    elif found[0]:
        raise RuntimeError(
            f"the service's role {name} may make roles or is a superuser: it could undo every "
            "grant; give DATABASE_URL a role without privileges of its own"
        )
    tables = {"append_only": ", ".join(APPEND_ONLY), "deletable": ", ".join(DELETABLE)}
    for statement in RIGHTS.format(role=role, **tables).split(";"):
        connection.execute(text(statement))


def _create(connection: Connection, role: str, password: str) -> None:
    able = "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
    if not connection.scalar(text(able)):
        raise RuntimeError(
            f"there is no role {role} and the role of MIGRATION_DATABASE_URL may not make it: run "
            f"CREATE ROLE {role} LOGIN PASSWORD '…' as somebody who may, and migrate again"
        )
    literal = connection.scalar(text("SELECT quote_literal(:word)"), {"word": password})
    connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD {literal}".replace("%", "%%"))
