"""The database: engine, transactions and what happens after a commit.

Owns the only ``commit`` of the project. Must not know any table or rule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial, wraps
from threading import Lock, local
from typing import Any, TypeVar, cast
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Text,
    Uuid,
    any_,
    column,
    create_engine,
    func,
    insert,
    literal,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from app import failpoints, tracing
from app.batching import Batcher

Clock = Callable[[], datetime]
Q = TypeVar("Q")
A = TypeVar("A")
S = TypeVar("S")
Values = Mapping[InstrumentedAttribute[Any], Any]
UNIQUE_VIOLATION = "23505"
log = logging.getLogger(__name__)


@dataclass
class Tx:
    """One transaction: a session, one fixed time, who acts, and what to do after the commit."""

    session: Session
    now: datetime
    actor: str
    _bell: Callable[[Sequence[UUID]], None]
    _hooks: list[Callable[[], None]] = field(default_factory=list)
    _rung: list[UUID] = field(default_factory=list)

    def insert(self, row: object, *, taken: Exception) -> None:
        """Insert a row at once; if its name is taken, raise ``taken``.

        Only the unique index can tell: whoever looks first may be overtaken by somebody else.
        """
        self.session.add(row)
        try:
            self.session.flush()
        except IntegrityError as error:
            if getattr(error.orig, "sqlstate", None) != UNIQUE_VIOLATION:
                raise
            raise taken from error

    def insert_each(self, own: Values, same: Values) -> None:
        """Insert rows into the table of these columns, in one statement however many they are.

        ``own`` are lists with a value for each row, ``same`` is what all rows have in common.
        """
        self.session.flush()  # what they point at
        kinds = {each: _kind(each) for each in own}
        lists = (literal(list(own[each]), ARRAY(kinds[each])) for each in own)
        drawn = func.unnest(*lists).table_valued(
            *(column(each.key, kinds[each]) for each in own), name="own"
        )
        common = (literal(value, each.type) for each, value in same.items())
        rows = select(*drawn.render_derived().c, *common)
        (table,) = {each.class_ for each in (*own, *same)}
        names = [each.key for each in (*own, *same)]
        self.session.execute(insert(table.__table__).from_select(names, rows))

    def after_commit(self, hook: Callable[[], None]) -> None:
        """Do this once the transaction is committed, never if it is rolled back."""
        self._hooks.append(hook)

    def ring(self, job_id: UUID) -> None:
        """Tell a worker of this job once the transaction is committed."""
        self._rung.append(job_id)

    def run_hooks(self) -> None:
        """Called by :class:`Database` alone. A failing hook is logged: the rows already stand."""
        if self._rung:
            self._hooks.append(partial(self._bell, self._rung))
        for hook in self._hooks:
            try:
                hook()
            except Exception:
                log.exception("after-commit hook failed; the sweeper will make up for it")


class Database:
    """Opens transactions; thread-safe."""

    def __init__(
        self,
        url: str,
        *,
        pool: int,
        clock: Clock,
        bell: Callable[[Sequence[UUID]], None],
        patience: float = 20.0,
    ) -> None:
        """``patience``: seconds a transaction may stand still before the server ends it.

        A process that freezes inside one must not keep its locks for ever.
        """
        self._engine = create_engine(
            url,
            pool_size=pool,
            max_overflow=pool,
            pool_pre_ping=True,
            pool_timeout=10,
            connect_args={
                "connect_timeout": 10,
                "options": f"-c idle_in_transaction_session_timeout={round(1000 * patience)}",
            },
        )
        self._clock = clock
        self._bell = bell
        self._batchers: dict[str, Batcher[Any, Any]] = {}
        self._lock = Lock()

    @contextmanager
    def transaction(self, actor: str, purpose: str) -> Iterator[Tx]:
        """Commit at the end, roll back on any exception, then run the after-commit hooks.

        ``purpose`` names the places before and after the commit (`app/failpoints.py`).
        """
        with (
            tracing.span(f"transaction {purpose}", kind="client"),
            Session(self._engine, expire_on_commit=False) as session,
        ):
            tx = Tx(session, self._clock(), actor, self._bell)
            yield tx
            failpoints.reach(f"{purpose}.before_commit")
            session.commit()
        failpoints.reach(f"{purpose}.after_commit")
        tx.run_hooks()

    def together(
        self, purpose: str, work: Callable[[Tx, Sequence[Q]], Sequence[A | Exception]], asked: Q
    ) -> A:
        """Do one call's work in a transaction with all calls of this purpose that wait by now.

        ``work`` answers every call, or names its refusal, which must have changed nothing; each
        call is answered after the commit. The transaction's actor is nobody: ``work`` acts for each
        caller with ``replace(tx, actor=…)``.
        """

        def commit(calls: Sequence[Q]) -> Sequence[A | Exception]:
            with self.transaction("nobody", purpose) as tx:
                return work(tx, calls)

        with self._lock:
            batcher = self._batchers.setdefault(purpose, Batcher(commit))
        return cast(A, batcher.ask(asked))

    @contextmanager
    def singleton(self, number: int) -> Iterator[bool]:
        """Hold an advisory lock while the block runs; yields False if another process has it.

        The lock belongs to a connection of its own, so it is freed even by ``kill -9``; that is in
        no transaction, so it may stand still.
        """
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            held = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:n)"), {"n": number}))
            try:
                yield held
            finally:
                if held:
                    connection.execute(text("SELECT pg_advisory_unlock(:n)"), {"n": number})

    def ping(self) -> str | None:
        """The schema revision, None before the first migration; raises if there is no database."""
        with self._engine.connect() as connection:
            if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
                return None
            found = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return None if found is None else str(found)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def per_thread(build: Callable[[], S]) -> Callable[[], S]:
    """A statement that takes time to build, built once in each thread.

    Threads must not share one: if several are the first to compile it, some of them fail.
    """
    own = local()

    @wraps(build)
    def statement() -> S:
        if not hasattr(own, "statement"):
            own.statement = build()
        return cast(S, own.statement)

    return statement


def among(attribute: InstrumentedAttribute[Any], values: Sequence[object]) -> ColumnElement[bool]:
    """That a column has one of these values, in the same statement however many they are.

    ``IN`` would be another statement for every number, to be planned and kept by the server.
    """
    return attribute == any_(literal(list(values), ARRAY(_kind(attribute))))


def _kind(attribute: InstrumentedAttribute[Any]) -> Uuid[UUID] | Text:
    return Uuid() if isinstance(attribute.type, Uuid) else Text()
