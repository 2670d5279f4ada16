"""The register of objects: claims, and the check that store and rows agree (I11)."""

from __future__ import annotations

import io
from uuid import uuid4

import pytest

from app import objects
from app.errors import Unavailable
from app.objects import check_objects

from .factories import contribute, drain, make_clients, make_model, make_run


@pytest.fixture
def published(project):
    """A project with one published round."""
    model = make_model(project)
    make_run(project, model)
    for seed, client in enumerate(make_clients(project, 2)):
        contribute(client, model, seed=seed)
    drain(project)
    return project


def problems(project):
    """(strays, missing) of this project: other tests leave theirs behind in the same store."""
    found = check_objects(project.core)
    known = {row[0] for row in project.sql("SELECT key FROM objects WHERE project_id = :project")}
    mine = [key for key in found.strays if str(project.id) in key]
    return mine, {key: why for key, why in found.missing if key in known}


def test_after_a_round_the_store_holds_what_the_rows_name_and_nothing_else(published):
    keys = published.sql("SELECT key FROM objects WHERE project_id = :project")
    # initial weights, two updates, two masks, one version
    assert sorted(key.partition("/")[0] for (key,) in keys) == [
        *["accepted"] * 3,
        *["masks"] * 2,
        "versions",
    ]
    assert problems(published) == ([], {})


def test_an_object_that_no_row_expects_is_a_stray(published):
    key = f"accepted/{published.id}/{'0' * 64}"
    published.core.storage.put(key, io.BytesIO(b"abc"), 3)
    assert problems(published) == ([key], {})


@pytest.mark.parametrize("table", ["updates", "masks", "versions"])
def test_a_lost_object_is_missing(published, table):
    query = f"SELECT object_key FROM {table} WHERE project_id = :project ORDER BY created_at DESC"
    ((key,), *_) = published.sql(query)
    published.core.storage.delete([key])
    assert problems(published) == ([], {key: "not in the store"})


def test_an_object_of_another_size_is_missing(published):
    ((key, size), *_) = published.sql(
        "SELECT object_key, size FROM updates WHERE project_id = :project"
    )
    published.core.storage.put(key, io.BytesIO(b"abc"), 3)
    assert problems(published) == ([], {key: f"3 bytes, its row says {size}"})


def test_a_claim_that_no_row_names_is_neither(published):
    with published.core.db.transaction("test", "test") as tx:
        objects.claim(tx, f"accepted/{published.id}/x", project=published.id, size=1)
    assert problems(published) == ([], {})


class TestClaims:
    @pytest.fixture
    def key(self, project):
        key = f"accepted/{project.id}/{uuid4().hex}"
        with project.core.db.transaction("test", "test") as tx:
            objects.claim(tx, key, project=project.id, size=5)
        return key

    def doom(self, project, key, *, deleted=False):
        gone = "now()" if deleted else "NULL"
        project.sql(
            f"UPDATE objects SET deletion_id = :id, deleted_at = {gone} WHERE key = :key",
            id=uuid4(),
            key=key,
        )

    def test_what_is_claimed_can_be_kept(self, project, key):
        with project.core.db.transaction("test", "test") as tx:
            objects.keep(tx, key)

    def test_claiming_again_renews(self, project, key, clock):
        clock.advance(60)
        with project.core.db.transaction("test", "test") as tx:
            objects.claim(tx, key, project=project.id, size=6)
        ((size, fresh),) = project.sql(
            "SELECT size, claimed_at > now() + interval '30 s' FROM objects WHERE key = :key",
            key=key,
        )
        assert (size, fresh) == (6, True)

    def test_what_was_never_claimed_cannot_be_kept(self, project):
        with (
            pytest.raises(Unavailable, match="write it again"),
            project.core.db.transaction("test", "test") as tx,
        ):
            objects.keep(tx, "accepted/unknown")

    def test_while_it_is_being_deleted_nobody_can_use_it(self, project, key):
        self.doom(project, key)
        for use in (
            lambda tx: objects.keep(tx, key),
            lambda tx: objects.claim(tx, key, project=project.id, size=5),
        ):
            with (
                pytest.raises(Unavailable) as refusal,
                project.core.db.transaction("test", "test") as tx,
            ):
                use(tx)
            assert refusal.value.code == "object_doomed"

    def test_after_its_deletion_it_must_be_claimed_anew(self, project, key):
        self.doom(project, key, deleted=True)
        with pytest.raises(Unavailable), project.core.db.transaction("test", "test") as tx:
            objects.keep(tx, key)
        with project.core.db.transaction("test", "test") as tx:
            objects.claim(tx, key, project=project.id, size=5)
            objects.keep(tx, key)
