"""The whole way: a run, a backup while clients upload, a wipe, a restore, and the run goes on."""

from __future__ import annotations

import base64
import io
import json
import secrets
import shutil
from contextlib import contextmanager

import psycopg
import pytest

from app import backup, retention, wiring
from app.cli import migrate
from app.errors import Unavailable
from app.main import create_app
from app.retention import COLLECTOR
from app.verification import verify
from fedselect import encryption
from fedselect.errors import FedSelectError
from fedselect.manifestdocs import Manifest
from fedselect.recompute import recompute
from workers import sweep

from .campaign import Campaign
from .factories import (
    Caller,
    Client,
    Project,
    TestClient,
    contribute,
    deliver,
    drain,
    make_project,
    ok,
    train,
)


@pytest.fixture(scope="module")
def place(environment):
    """Makes deployments on a database and a bucket of their own; nothing is in them."""
    roles = {role: environment[role] for role in ("DATABASE_URL", "MIGRATION_DATABASE_URL")}
    url = roles["MIGRATION_DATABASE_URL"]
    opened, made = [], []

    def make(*, schema=False, **changes):
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        made.append(name)
        own = {role: f"{url.rpartition('/')[0]}/{name}" for role, url in roles.items()}
        own |= {"S3_BUCKET": name.replace("_", "-"), **changes}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {**environment, **own}.items():
                patch.setenv(key, value)
            core = wiring.build()
            if schema:
                migrate()
        core.storage.prepare()
        opened.append(core)
        return core

    yield make
    for core in opened:
        core.close()
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        for name in made:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def served(place):
    """A deployment that serves, with two published rounds of a run of four."""
    core = place(schema=True)
    app = create_app(core.settings)
    with TestClient(app, raise_server_exceptions=False) as api:
        app.state.core.close()
        app.state.core = core
        yield Campaign(make_project(core, api), rounds=4, published=2)


@pytest.fixture(scope="module")
def kept(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backups") / "kept"
    backup.back_up(served.core, folder)
    return folder


@pytest.fixture
def saved(kept, tmp_path):
    """A backup that a test may damage."""
    return shutil.copytree(kept, tmp_path / "saved")


def again(core, campaign):
    """The same campaign at a restored deployment: same keys, same ids."""
    app = create_app(core.settings)
    api = TestClient(app, raise_server_exceptions=False)
    app.state.core.close()
    app.state.core = core
    was = campaign.project
    project = Project(core, api, was.id, Caller(api, was.owner.key))
    found = object.__new__(Campaign)
    found.project, found.core = project, core
    found.model, found.run = campaign.model, campaign.run
    found.clients = [Client(api, c.key, c.id, c.name) for c in campaign.clients]
    return found


def recomputed(campaign):
    """Numbers of the versions that follow from their manifests, byte for byte."""
    numbers = []
    for found in campaign.versions():
        if not found["number"]:
            continue
        (key,) = campaign.project.sql(
            "SELECT object_key FROM versions WHERE id = :id", id=found["id"]
        )[0]
        document = ok(campaign.manifest(found["number"]))
        manifest = Manifest.model_validate(document["manifest"])
        assert recompute(manifest, campaign.core.storage.read) == campaign.core.storage.read(key)
        numbers.append(found["number"])
    return numbers


def test_a_backup_while_clients_upload_and_the_way_back(served, place, tmp_path):
    sweep.seal(served.core)
    first, second = served.clients
    contribute(first, served.model, seed=30)
    drain(served.project)
    assignment = second.assignment()
    deliver(second, assignment, train(assignment, served.model.space, seed=31).data)

    # The dump is taken between the two copies: just then the second update is verified, round 3 is
    # published, and round 4 gets an update.
    whole = backup._dump

    def busy(settings, folder):
        dumped = whole(settings, folder)
        drain(served.project)
        sweep.seal(served.core)
        contribute(first, served.model, seed=40)
        drain(served.project)
        return dumped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backup, "_dump", busy)
        made = backup.back_up(served.core, tmp_path / "backup")
    assert len(recomputed(served)) == 3
    assert backup.read(tmp_path / "backup") == made

    core = place()
    backup.restore(core, tmp_path / "backup")
    found = verify(core)
    assert found.findings == ()
    assert found.entries > 20
    assert (found.versions, found.updates, found.manifests) == (4, 5, 2)  # number 0 is there twice
    restored = again(core, served)
    assert recomputed(restored) == [1, 2]
    # What was uploaded before the dump was not lost: it is verified now, and the round goes on.
    drain(restored.project)
    assert recomputed(restored) == [1, 2, 3]
    assert restored.versions()[3]["sha256"] == served.versions()[3]["sha256"]
    restored.round(9)
    assert recomputed(restored) == [1, 2, 3, 4]
    sweep.seal(core)
    retention.collect(core, strays=True)
    assert verify(core).findings == ()


@contextmanager
def lost(core, key):
    """The store has lost an object; afterwards it is back."""
    data = core.storage.read(key)
    core.storage.delete([key])
    yield
    core.storage.put(key, io.BytesIO(data), len(data))


def code_of(work):
    with pytest.raises(FedSelectError) as refusal:
        work()
    return refusal.value.code


def test_a_target_that_holds_something_is_refused_unless_forced(saved, served, place):
    core = place()
    core.storage.put("staging/left", io.BytesIO(b"x"), 1)
    assert code_of(lambda: backup.restore(core, saved)) == "restore_not_empty"
    assert core.storage.size("staging/left") == 1
    backup.restore(core, saved, force=True)
    assert core.storage.size("staging/left") is None
    assert code_of(lambda: backup.restore(core, saved)) in {"restore_not_empty", "restore_in_use"}
    core.db.close()
    assert code_of(lambda: backup.restore(core, saved)) == "restore_not_empty"
    backup.restore(core, saved, force=True)
    assert verify(core).findings == ()


def test_a_database_in_use_is_refused_even_by_force(saved, place):
    core = place()
    with core.db.transaction("somebody", "test") as tx:
        tx.session.connection()
        assert code_of(lambda: backup.restore(core, saved, force=True)) == "restore_in_use"


@pytest.mark.parametrize("damage", ["edited", "cut", "lost", "list"])
def test_a_damaged_backup_is_refused_before_anything_is_touched(saved, place, damage):
    (victim, *_) = sorted((saved / "objects" / "accepted").rglob("*/*"))
    if damage == "edited":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "lost":
        victim.unlink()
    else:
        (saved / "backup.json").write_text("{}")
    core = place()
    core.storage.put("staging/left", io.BytesIO(b"x"), 1)
    assert code_of(lambda: backup.restore(core, saved, force=True)) == "backup_invalid"
    assert core.storage.size("staging/left") == 1


def test_a_list_that_leads_out_of_the_folder_is_refused(saved, place):
    content = json.loads((saved / "backup.json").read_text())
    content["files"][0]["path"] = "../elsewhere"
    (saved / "backup.json").write_text(json.dumps(content))
    assert code_of(lambda: backup.restore(place(), saved)) == "backup_invalid"


def test_other_secrets_are_refused(saved, place):
    core = place(KEY_PEPPER="p" * 64)
    assert code_of(lambda: backup.restore(core, saved)) == "restore_secrets"


def test_a_backup_holds_what_is_encrypted_as_it_is(saved, served, place):
    """Update files and masks need the key, which is not in it; a restore without it is refused."""
    hidden = [path for path in saved.rglob("*.enc") if path.is_file()]
    assert len(hidden) >= 8, "two rounds of two updates and masks"
    assert all(path.read_bytes().startswith(encryption.MAGIC) for path in hidden)
    listed = json.loads((saved / "backup.json").read_text())
    assert listed["encryption_keys"] == served.core.ring.ids
    assert served.core.settings.encryption_key.get_secret_value() not in str(listed)
    core = place(ENCRYPTION_KEY=base64.b64encode(bytes(32)).decode())
    assert code_of(lambda: backup.restore(core, saved)) == "restore_secrets"


def test_a_backup_from_which_an_object_is_missing_is_none(served, tmp_path):
    ((key,), *_) = served.project.sql("SELECT object_key FROM masks")
    with lost(served.core, key):
        assert code_of(lambda: backup.back_up(served.core, tmp_path / "b")) == "backup_incomplete"


def test_it_needs_an_empty_folder_and_nobody_who_deletes(served, tmp_path):
    (tmp_path / "x").write_text("mine")
    assert code_of(lambda: backup.back_up(served.core, tmp_path)) == "backup_folder"
    with served.core.db.singleton(COLLECTOR), pytest.raises(Unavailable):
        backup.back_up(served.core, tmp_path / "empty")


def test_the_verification_finds_what_is_wrong(served):
    assert verify(served.core).findings == ()
    ((key, size), *_) = served.project.sql("SELECT object_key, size FROM versions WHERE number = 2")
    ((mask,), *_) = served.project.sql("SELECT object_key FROM masks")
    with lost(served.core, key), lost(served.core, mask):
        served.core.storage.put(key, io.BytesIO(b"\0" * size), size)
        first, second = sorted(verify(served.core).findings, key=lambda line: "SHA" not in line)
    assert first.startswith(f"{key}: its SHA-256 is ")
    assert second == f"{mask}: not in the store"
    assert verify(served.core).findings == ()


def test_the_verification_compares_the_ledger_with_the_head_that_the_store_keeps(served):
    sweep.seal(served.core)
    before = verify(served.core)
    assert before.findings == ()
    (key,) = (k for k in served.core.storage.keys("checkpoints/") if k.endswith("/latest"))
    head = served.core.storage.read(key)
    wrong = head.replace(f"\n{before.entries}\n".encode(), f"\n{before.entries + 1}\n".encode())
    assert wrong != head
    served.core.storage.put(key, io.BytesIO(wrong), len(wrong))
    assert any(finding.startswith("ledger: ") for finding in verify(served.core).findings)
    served.core.storage.put(key, io.BytesIO(head), len(head))
    assert verify(served.core).findings == ()
