"""The ledger in the service: sealed, stored, proven, and wrong as soon as somebody touches it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import psycopg
import pytest
from alembic import command as alembic
from alembic.config import Config
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.pool import NullPool

from app import ledger, wiring
from app.cli import migrate
from app.heads import StoredHeads
from app.ledger import Sealer
from app.ledgercheck import check_ledger
from app.settings import AppSettings
from app.tables import Table
from app.wiring import Coordinator
from fedselect import audit
from fedselect.errors import LedgerError
from migrations.grants import APPEND_ONLY, DELETABLE
from workers import sweep

from .factories import (
    Caller,
    Project,
    contribute,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    ok,
    refused,
)


@pytest.fixture
def told(project: Project) -> Project:
    """A project with a published round: something of everything is in the ledger."""
    model = make_model(project)
    make_run(project, model)
    for seed, client in enumerate(make_clients(project, 2)):
        contribute(client, model, seed=seed)
    drain(project)
    sweep.seal(project.core)
    return project


def head_of(caller: Caller) -> audit.Checkpoint:
    found = ok(caller.get("/v1/ledger/checkpoint"))
    return audit.verify_checkpoint(found["text"], found["public_key"])


def hashes(proof: dict) -> list[bytes]:
    return [bytes.fromhex(text) for text in proof["hashes"]]


# --- what callers see ----------------------------------------------------------------------------


def test_the_ledger_and_the_rows_tell_the_same(told: Project) -> None:
    found = check_ledger(told.core)
    assert found.findings == ()
    assert found.entries == found.sealed > 10
    assert found.checkpoints >= found.stored - 1 > 0


def test_of_other_projects_an_auditor_sees_hashes_that_complete_the_tree(
    told: Project, other: Project
) -> None:
    sweep.seal(told.core)
    checkpoint = ok(told.owner.get("/v1/ledger/checkpoint"))
    size = head_of(told.owner).size
    shown = {}
    for project in (told, other):
        found = everything(project.caller("auditor"), "/v1/ledger/entries", limit=1000)[:size]
        lines = [audit.export_line(e["seq"], bytes.fromhex(e["leaf"]), e["entry"]) for e in found]
        head = {"checkpoint": checkpoint["text"], "public_key": checkpoint["public_key"]}
        lines.append(audit.canonical_json(head).decode())
        report = audit.verify_export(lines, public_key=told.core.sealer.public_key, partial=True)
        own = [e["entry"] for e in found if e["entry"] is not None]
        assert own
        assert {e["project"] for e in own} == {str(project.id)}
        assert report.withheld == size - len(own) > 0
        shown[project.id] = {e["seq"] for e in own}
    assert not shown[told.id] & shown[other.id]


def test_everybody_may_ask_for_proofs(told: Project) -> None:
    head = head_of(told.owner)
    for caller in (told.owner, told.caller("auditor"), make_client(told)):
        for seq in (0, 1, head.size // 2, head.size - 1):
            path = "/v1/ledger/proofs/inclusion"
            proof = ok(caller.get(path, seq=seq, size=head.size))
            leaf = bytes.fromhex(proof["leaf"])
            audit.verify_inclusion(leaf, hashes(proof), index=seq, size=head.size, root=head.root)
        refused(make_client(told).get("/v1/ledger/entries"), 403, "scope_missing")


def test_proofs_of_what_is_not_there(told: Project) -> None:
    size = head_of(told.owner).size
    inclusion, consistency = "/v1/ledger/proofs/inclusion", "/v1/ledger/proofs/consistency"
    ask = told.owner.get
    refused(ask(inclusion, seq=size, size=size), 422, "proof_invalid")
    refused(ask(inclusion, seq=0, size=size + 10**6), 404, "ledger_shorter")
    refused(ask(consistency, first=0, second=size + 10**6), 404, "ledger_shorter")
    refused(ask(consistency, first=2, second=1), 422, "proof_invalid")
    refused(ask(inclusion, seq=-1, size=5), 422, "request_invalid")
    assert ok(ask(consistency, first=0, second=size))["hashes"] == []
    assert ok(ask(consistency, first=size, second=size))["hashes"] == []


def test_a_client_is_told_the_key_when_it_registers(project: Project) -> None:
    token = ok(project.owner.post("/v1/enrolments", {}), 201)["tokens"][0]
    made = ok(Caller(project.api, None).post("/v1/clients", {"token": token, "name": "w"}), 201)
    assert made["ledger_key"] == project.core.sealer.public_key
    assert ok(Caller(project.api, made["key"]).get("/v1/ledger/keys")) == {
        "public_key": made["ledger_key"],
        "statements": [],
    }


# --- a ledger of its own, to be tampered with ----------------------------------------------------

SIZES = (1, 2, 3, 7, 8, 64, 100, 127, 200)


@pytest.fixture(scope="module")
def template(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a migrated, empty database that others are copied from."""
    return _database(environment, "template0") | {"KEEP": "template"}


def plain(url: str) -> str:
    return url.replace("+psycopg", "")


def _database(environment: dict[str, str], template: str) -> dict[str, str]:
    name = f"ledger_{secrets.token_hex(6)}"
    roles = {role: environment[role] for role in ("DATABASE_URL", "MIGRATION_DATABASE_URL")}
    with psycopg.connect(plain(roles["MIGRATION_DATABASE_URL"]), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    own = environment | {role: f"{url.rpartition('/')[0]}/{name}" for role, url in roles.items()}
    if template == "template0":
        with pytest.MonkeyPatch.context() as patch:
            for key, value in own.items():
                patch.setenv(key, value)
            migrate()
    return own


@pytest.fixture
def own(template: dict[str, str]) -> Iterator[Coordinator]:
    """A coordinator whose ledger has 200 entries under heads of the sizes above."""
    environment = _database(template, template["DATABASE_URL"].rpartition("/")[2])
    origin = f"fedselect.test/{secrets.token_hex(6)}"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        core = wiring.build(AppSettings(ledger_origin=origin))
        for size in SIZES:
            grow(core, size)
        yield core
        core.close()


def grow(core: Coordinator, size: int) -> str:
    """Append and seal until there are so many entries; returns the head."""
    with core.db.transaction("test", "test") as tx:
        for number in range(ledger.sealed_size(tx), size):
            ledger.append(tx, "test.done", f"test:{number}", project=None, body={"n": number})
    sweep.seal(core)
    return newest(core)


def newest(core: Coordinator) -> str:
    with core.db.transaction("test", "test") as tx:
        head = ledger.newest_checkpoint(tx)
        assert head is not None
        return head.text


def as_owner(*statements: str) -> None:
    """What a database administrator could do: the triggers are no obstacle to the tables' owner."""
    tables = ("ledger_entries", "ledger_seals", "ledger_checkpoints")
    with psycopg.connect(plain(os.environ["MIGRATION_DATABASE_URL"])) as connection:
        for table in tables:
            connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER append_only")
        for statement in statements:
            connection.execute(statement)
        for table in tables:
            connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER append_only")


def test_every_head_is_stored_and_proven_from_every_other(own: Coordinator) -> None:
    stored = {audit.read_checkpoint(head).size: head for _, head in own.heads.all()}
    assert set(stored) == set(SIZES)
    for first, old in stored.items():
        for second, new in stored.items():
            if first > second:
                continue
            before = audit.verify_checkpoint(old, own.sealer.public_key)
            after = audit.verify_checkpoint(new, own.sealer.public_key)
            with own.db.transaction("test", "test") as tx:
                proof = ledger.prove_consistency(tx, first=first, second=second)
            audit.verify_consistency(
                [bytes.fromhex(h) for h in proof.hashes],
                old_size=first,
                old_root=before.root,
                size=second,
                root=after.root,
            )
    found = check_ledger(own)
    assert (found.findings, found.checkpoints, found.stored) == ((), 9, 10)


TAMPERED: dict[str, tuple[str, ...]] = {
    "an entry is edited": ("UPDATE ledger_entries SET body = '{\"n\": 1}' WHERE id = 51",),
    "its actor is another": ("UPDATE ledger_entries SET actor = 'x' WHERE id = 200",),
    "its time is another": ("UPDATE ledger_entries SET at = at - interval '1 us' WHERE id = 1",),
    "two entries are swapped": (
        "UPDATE ledger_seals SET entry_id = -1 WHERE seq = 10",
        "UPDATE ledger_seals SET entry_id = 11 WHERE seq = 11",
        "UPDATE ledger_seals SET entry_id = 12 WHERE seq = 10",
    ),
    "an entry is gone": (
        "DELETE FROM ledger_seals WHERE seq = 77",
        "DELETE FROM ledger_entries WHERE id = 78",
    ),
    "the tail is gone": ("DELETE FROM ledger_seals WHERE seq >= 150",),
    "the tail is gone with its heads": (
        "DELETE FROM ledger_seals WHERE seq >= 127",
        "DELETE FROM ledger_checkpoints WHERE size > 127",
        "DELETE FROM ledger_entries WHERE id > 127",
    ),
    "all is gone": (
        "DELETE FROM ledger_seals",
        "DELETE FROM ledger_checkpoints",
        "DELETE FROM ledger_entries",
    ),
    "a head is gone": ("DELETE FROM ledger_checkpoints WHERE size = 200",),
    "a head is another": (
        "UPDATE ledger_checkpoints a SET text = b.text FROM ledger_checkpoints b "
        "WHERE a.size = 100 AND b.size = 127",
    ),
    "an inner node is another": (
        "UPDATE ledger_seals SET subtrees = set_byte(subtrees, 0, get_byte(subtrees, 0) # 1) "
        "WHERE seq = 63",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_the_owner_of_the_tables_does_is_found(own: Coordinator, what: str) -> None:
    if what == "two entries are swapped":
        as_owner("ALTER TABLE ledger_seals DROP CONSTRAINT fk_ledger_seals_entry_id")
    as_owner(*TAMPERED[what])
    assert check_ledger(own).findings


def test_the_first_finding_names_the_entry(own: Coordinator) -> None:
    as_owner(*TAMPERED["an entry is edited"])
    assert check_ledger(own).findings[0] == "entry 50 does not match its leaf hash"


# --- two roles ----------------------------------------------------------------------------------

PER_TABLE = (
    "UPDATE {0} SET {1} = {1}",
    "DELETE FROM {0}",
    "TRUNCATE {0} CASCADE",
    "SELECT 1 FROM {0} FOR UPDATE",
    "ALTER TABLE {0} DISABLE TRIGGER ALL",
    "ALTER TABLE {0} DISABLE TRIGGER append_only",
    "DROP TRIGGER append_only ON {0}",
    "ALTER TABLE {0} RENAME TO another",
    "DROP TABLE {0} CASCADE",
)
COLUMNS = {
    "ledger_entries": "actor",
    "ledger_seals": "leaf",
    "ledger_checkpoints": "text",
    "transitions": "actor",
    "manifests": "body",
}
ELSEWHERE = (
    "CREATE OR REPLACE FUNCTION forbid_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
    "DROP FUNCTION forbid_change CASCADE",
    "SET session_replication_role = replica",
    "CREATE TABLE public.mine (id int)",
    "CREATE ROLE another SUPERUSER",
    "SET ROLE fedselect",
    "UPDATE alembic_version SET version_num = '0000'",
    "TRUNCATE clients CASCADE",
)
KEPT = [f"DELETE FROM {name}" for name in Table.metadata.tables if name not in DELETABLE]
FORBIDDEN = [s.format(t, c) for t, c in COLUMNS.items() for s in PER_TABLE] + [*ELSEWHERE, *KEPT]


def test_every_append_only_table_is_tried() -> None:
    assert set(COLUMNS) == set(APPEND_ONLY)


def test_the_service_s_role_can_neither_change_the_past_nor_take_the_triggers_away(
    own: Coordinator,
) -> None:
    before = newest(own)
    with psycopg.connect(plain(os.environ["DATABASE_URL"]), autocommit=True) as service:
        for statement in FORBIDDEN:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute(statement)
    assert newest(own) == before
    assert check_ledger(own).findings == ()


def test_the_triggers_refuse_the_owner_too(own: Coordinator) -> None:
    """Nobody changes the past by accident, whatever role it is."""
    with psycopg.connect(plain(os.environ["MIGRATION_DATABASE_URL"]), autocommit=True) as owner:
        for statement in (s.format(t, c) for t, c in COLUMNS.items() for s in PER_TABLE[:3]):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="never changed"):
                owner.execute(statement)


def test_one_role_may_do_both(own: Coordinator) -> None:
    """Where an operator has only one role, it migrates, and nothing has to be granted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", os.environ["MIGRATION_DATABASE_URL"])
        patch.delenv("MIGRATION_DATABASE_URL")
        migrate()


def test_migrating_makes_the_service_s_role_or_says_how(own: Coordinator) -> None:
    url = make_url(os.environ["DATABASE_URL"])
    fresh = url.set(username=f"made_{secrets.token_hex(4)}", password="100% 'of' it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", fresh.render_as_string(hide_password=False))
        migrate()
    engine = create_engine(fresh, poolclass=NullPool)
    with engine.connect() as service:
        assert service.scalar(text("SELECT count(*) FROM ledger_entries")) == SIZES[-1]
    owner = plain(os.environ["MIGRATION_DATABASE_URL"])
    with psycopg.connect(owner, autocommit=True) as server:
        server.execute(f"DROP OWNED BY {fresh.username}")
        server.execute(f"DROP ROLE {fresh.username}")
        able = f"able_{secrets.token_hex(4)}"
        server.execute(f"CREATE ROLE {able} LOGIN CREATEROLE PASSWORD 'x'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", str(url.set(username=able, password="x")))
        with pytest.raises(RuntimeError, match="could undo"):
            migrate()


# --- a database that knows less, or something else ---------------------------------------------


def restarted(core: Coordinator) -> Coordinator:
    """The same service after a restart: what it remembered of the store is gone."""
    return replace(core, heads=StoredHeads(core.storage, core.settings.ledger_origin))


@pytest.mark.parametrize("fresh", [True, False], ids=["restarted", "running"])
@pytest.mark.parametrize("what", ["the tail is gone with its heads", "all is gone"])
def test_a_database_behind_its_stored_head_is_not_sealed(
    own: Coordinator, what: str, fresh: bool
) -> None:
    as_owner(*TAMPERED[what])
    core = restarted(own) if fresh else own
    with core.db.transaction("test", "test") as tx:
        before = ledger.sealed_size(tx)
        ledger.append(tx, "test.done", "test:new", project=None)
    with pytest.raises(LedgerError) as caught:
        sweep.seal(core)
    assert caught.value.code == "ledger_rolled_back"
    with core.db.transaction("test", "test") as tx:
        assert ledger.sealed_size(tx) == before


def test_the_operator_can_go_on_with_what_is_left(own: Coordinator) -> None:
    """docs/LEDGER.md, After a restore: the stored heads are moved away; agents still see it."""
    kept = newest(own)
    as_owner(*TAMPERED["the tail is gone with its heads"])
    core = restarted(own)
    core.storage.delete([key for key, _ in core.heads.all()])
    head = grow(core, 250)
    assert check_ledger(core).findings == ()
    with core.db.transaction("test", "test") as tx:
        assert ledger.root_at(tx, 200) != audit.read_checkpoint(kept).root
    assert audit.read_checkpoint(head).size == 250


def test_a_ledger_that_was_written_anew_is_not_sealed(own: Coordinator) -> None:
    """The forger even has the key: an honest-looking ledger of the same size and more."""
    as_owner(*TAMPERED["all is gone"])
    forger = restarted(own)
    forger = replace(forger, heads=StoredHeads(own.storage, "elsewhere"))
    grow(forger, 250)
    with own.db.transaction("test", "test") as tx:
        ledger.append(tx, "test.done", "test:new", project=None)
    with pytest.raises(LedgerError) as caught:
        sweep.seal(restarted(own))
    assert caught.value.code == "ledger_forked"
    assert check_ledger(own).findings


def test_a_head_that_was_not_stored_is_stored_by_the_next_round(own: Coordinator) -> None:
    """The crash between the commit and the object store."""
    with own.db.transaction("test", "test") as tx:
        ledger.append(tx, "test.done", "test:new", project=None)
        own.sealer.seal(tx)
    core = restarted(own)
    assert newest(core) not in {head for _, head in core.heads.all()}
    sweep.seal(core)
    stored = dict(core.heads.all())
    assert [head for key, head in stored.items() if key.endswith("/latest")] == [newest(core)]
    assert len(stored) == len(SIZES) + 2


def test_an_entry_that_commits_late_is_sealed(own: Coordinator) -> None:
    with own.db.transaction("late", "test") as late:
        ledger.append(late, "test.late", "test:late", project=None)
        late.session.flush()
        grow(own, 210)
    sweep.seal(own)
    found = check_ledger(own)
    assert (found.unsealed, found.findings) == (0, ())


def test_what_is_sealed_survives_the_way_down_and_up(own: Coordinator) -> None:
    """The migration that added the inner nodes computes them for what was sealed before."""
    config = Config()
    config.set_main_option("script_location", "migrations:.")
    config.set_main_option("path_separator", "os")
    alembic.downgrade(config, "0004")
    alembic.upgrade(config, "head")
    alembic.check(config)
    assert check_ledger(own).findings == ()
    grow(own, 260)
    assert check_ledger(own).findings == ()


# --- another key ---------------------------------------------------------------------------------


def with_key(core: Coordinator, seed: bytes) -> Coordinator:
    """The same service with another LEDGER_KEY."""
    return replace(restarted(core), sealer=Sealer(seed, core.settings.ledger_origin))


def rotate(core: Coordinator, *, old: bytes, new: bytes) -> str:
    with core.db.transaction("test", "test") as tx:
        return ledger.rotate(tx, old=old, new=new, origin=core.settings.ledger_origin)


def test_a_key_is_changed_and_everybody_can_follow(own: Coordinator) -> None:
    seeds = [own.settings.ledger_seed, bytes(32), bytes([1]) * 32]
    heads = [newest(own)]
    for old, new in pairwise(seeds):
        core = with_key(own, new)
        with core.db.transaction("test", "test") as tx:
            ledger.append(tx, "test.done", "test:new", project=None)
        with pytest.raises(LedgerError) as caught:
            sweep.seal(core)  # nothing is signed with a key that the ledger does not know
        assert caught.value.code == "ledger_key_unknown"
        assert newest(core) == heads[-1]
        assert rotate(core, old=old, new=new) == core.sealer.public_key
        assert rotate(core, old=old, new=new) == core.sealer.public_key, "repeating is harmless"
        sweep.seal(core)
        heads.append(newest(core))
        assert check_ledger(core).findings == ()
    with core.db.transaction("test", "test") as tx:
        ledger.append(tx, "test.done", "test:new", project=None)
        statements = [body["statement"] for body in ledger.rotations(tx)]
    keys = audit.follow_keys(own.sealer.public_key, statements)
    assert keys == [with_key(own, seed).sealer.public_key for seed in seeds]
    for head, key in zip(heads, keys, strict=True):
        audit.verify_checkpoint(head, key)
    with pytest.raises(LedgerError):
        sweep.seal(restarted(own))  # a worker that still has the first key
    with pytest.raises(LedgerError):
        rotate(own, old=seeds[0], new=bytes([9]) * 32)


def test_an_export_follows_the_change_of_key(own: Coordinator) -> None:
    before = newest(own)
    rotate(own, old=own.settings.ledger_seed, new=bytes(32))
    core = with_key(own, bytes(32))
    sweep.seal(core)
    with core.db.transaction("test", "test") as tx:
        rows = list(ledger.sealed_entries(tx, start=0, limit=1000))
        shown = [(seal.seq, seal.leaf, ledger.document(seal.seq, entry)) for seal, entry in rows]
    head = {"checkpoint": newest(core), "public_key": core.sealer.public_key}
    lines = [audit.export_line(*row) for row in shown] + [audit.canonical_json(head).decode()]
    for key in (own.sealer.public_key, core.sealer.public_key, None):
        report = audit.verify_export(lines, public_key=key, heads=[before])
        assert report.public_key == core.sealer.public_key
    stranger = Sealer(bytes([7]) * 32, own.settings.ledger_origin).public_key
    with pytest.raises(LedgerError, match="not by"):
        audit.verify_export(lines, public_key=stranger)


# --- how long ------------------------------------------------------------------------------------


def test_a_proof_is_two_queries(own: Coordinator) -> None:
    queries: list[str] = []
    engine = own.db._engine
    event.listen(engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
    with own.db.transaction("test", "test") as tx:
        ledger.prove_consistency(tx, first=77, second=200)
    assert len(queries) == 2
