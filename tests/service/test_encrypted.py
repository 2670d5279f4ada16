"""Encryption at rest: what sites send is nowhere in the store in plain, and everything works on."""

from __future__ import annotations

import io
import secrets
from dataclasses import replace

import httpx
import pytest

from app.encrypted import SUFFIX, KeyRing, encrypted, re_encrypt
from app.errors import Unavailable
from app.settings import SettingsError, read
from app.verification import verify
from fedselect import encryption
from fedselect.client import Client
from fedselect.encryption import FRAME, SEALED
from fedselect.errors import ServiceError
from fedselect.protocol import MULTIPART_FROM
from fedselect.recompute import recompute
from workers import running
from workers.copying import Copy

from .campaign import Campaign
from .factories import (
    contribute,
    deliver,
    drain,
    due_jobs,
    make_clients,
    make_model,
    make_project,
    make_run,
    ok,
    refused,
    train,
)
from .test_objects import problems
from .test_round_trip import opened, recomputed

KEYS = [bytes([n]) * 32 for n in range(3)]


@pytest.fixture
def folder():
    return f"accepted/{secrets.token_hex(8)}"


def beside(core, *keys):
    """The same bucket with other keys."""
    ring = KeyRing(keys)
    return replace(core, storage=encrypted(core.storage.stored, ring), ring=ring)


def raw(core, *prefixes):
    """All objects below these prefixes as they lie in the store."""
    keys = [key for prefix in prefixes for key in core.storage.keys(prefix)]
    return {key: core.storage.stored.read(key) for key in keys}


# --- what sites send ---------------------------------------------------------------------------


def test_nothing_that_a_site_has_sent_lies_in_plain(project):
    model = make_model(project)
    make_run(project, model, rounds=2)
    sent = []
    for seed, client in enumerate(make_clients(project, 2)):
        assignment = client.assignment()
        sent.append(train(assignment, model.space, seed=seed))
        deliver(client, assignment, sent[-1].data)
    bad, broken = make_clients(project, 1), b"not an update " * 100
    drain(project)
    deliver(bad[0], bad[0].assignment(), broken)
    drain(project)
    found = raw(
        project.core, *(f"{p}{project.id}/" for p in ("accepted/", "masks/", "quarantine/"))
    )
    kinds = {key.partition("/")[0] for key in found}
    assert kinds == {"accepted", "masks", "quarantine"}
    hidden = [key for key in found if key.endswith(SUFFIX)]
    assert len(hidden) == 5, "two updates, two masks, one refused file"
    assert all(found[key].startswith(encryption.MAGIC) for key in hidden)
    plain = [each.data[-200:] for each in sent] + [each.mask.to_bytes() for each in sent] + [broken]
    assert not [p for p in plain for data in found.values() if p in data]
    initial = [key for key in found if key not in hidden]
    assert len(initial) == 1, "a model's weights are for every agent, and stay in plain"


def test_the_name_of_a_mask_says_nothing_of_it(project):
    """Two clients send the same mask; its digest is in no name, and the names differ."""
    model = make_model(project)
    make_run(project, model, rounds=2)
    mask = None
    for client in make_clients(project, 2):
        assignment = client.assignment()
        made = train(assignment, model.space, mask=mask)
        mask = made.mask
        deliver(client, assignment, made.data)
    drain(project)
    names = list(project.core.storage.keys(f"masks/{project.id}/"))
    assert len(names) == 2
    assert not [name for name in names if mask.digest in name]


def test_sums_of_a_gathering_round_are_encrypted(project):
    core = replace(project.core, settings=project.core.settings.model_copy(update={"fold_from": 0}))
    project = replace(project, core=core)
    model = make_model(project)
    make_run(project, model, rounds=1, goal=12, quorum=9)
    for seed, client in enumerate(make_clients(project, 8)):
        contribute(client, model, seed=seed)
    drain(project)
    ((key,),) = project.sql("SELECT object_key FROM partial_sums WHERE project_id = :project")
    assert key.endswith(SUFFIX)
    assert core.storage.stored.read(key).startswith(encryption.MAGIC)


def test_a_manifest_brings_the_keys_of_its_files_and_of_no_other(project):
    campaign = Campaign(project, rounds=2, published=2)
    document = ok(campaign.manifest(2))
    files = document["downloads"]
    hidden = sorted(name for name in files if name.endswith(SUFFIX))
    assert len(hidden) == 4
    assert [name for name in sorted(files) if files[name]["file_keys"]] == hidden
    version = campaign.versions()[-1]
    ((key,),) = project.sql("SELECT object_key FROM versions WHERE id = :id", id=version["id"])
    assert recomputed(document, campaign.model.space) == project.core.storage.read(key)
    # What opens one file opens no other one.
    one, other, *_ = hidden
    keys = [files[name]["file_keys"] for name in (one, other)]
    files[other]["file_keys"], files[one]["file_keys"] = keys
    with pytest.raises(encryption.DecryptionError):
        opened(document)


def sdk(caller):
    """The client SDK with this key; the store is asked as it is."""

    def ask(request):
        if request.url.host == "coordinator":
            path, headers = request.url.raw_path.decode(), dict(request.headers)
            content = request.content
            found = caller.api.request(request.method, path, headers=headers, content=content)
        else:
            with httpx.Client(trust_env=False) as store:
                found = store.send(request)
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    return Client("http://coordinator", key=caller.key, transport=httpx.MockTransport(ask))


def test_the_sdk_gives_the_plain_bytes(core, api):
    project = make_project(core, api)
    campaign = Campaign(project, rounds=1, published=1)
    (found,) = [r for r in campaign.rounds() if r["manifest_sha256"]]
    with sdk(project.owner) as client:
        document = client.manifest(found["id"])
        files = {name: client.fetch(d) for name, d in document.downloads.items()}
        assert recompute(document.manifest, files.__getitem__)
        name = next(name for name in files if name.endswith(SUFFIX))
        wrong = dict.fromkeys(document.downloads[name].file_keys, "00" * 32)
        spoilt = document.downloads[name].model_copy(update={"file_keys": wrong})
        with pytest.raises(ServiceError) as refusal:
            client.fetch(spoilt)
        assert refusal.value.code == "download_mismatch"
    assert "file_keys" not in repr(document.downloads[name]), "keys are in no log"


# --- the storage port --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME + 17])
def test_an_encrypted_object_is_read_as_it_was_written(core, folder, size):
    key, data = f"{folder}/a{SUFFIX}", secrets.token_bytes(size)
    core.storage.put(key, io.BytesIO(data), size)
    assert core.storage.size(key) == size
    assert [e.size for e in core.storage.entries(folder)] == [size]
    assert core.storage.stored.size(key) == encryption.encrypted_size(size)
    assert b"".join(core.storage.stream(key)) == core.storage.read(key) == data
    fresh = beside(core, *core.settings.encryption_keys)  # it has read no head yet
    starts = {0, 1, FRAME - 1, FRAME, size // 2, max(0, size - 3), size, size + 5}
    for start in sorted(starts):
        for length in (1, 5, FRAME, 2 * FRAME + 1, 0):
            wanted = data[start : start + length] if length else data[start:]
            if length or start < size:
                assert fresh.storage.read(key, start, length) == wanted, (start, length)
    core.storage.delete([key])
    with pytest.raises(Exception, match="not in the store"):
        core.storage.read(key)


def test_a_large_object_is_written_in_parts(core, folder):
    key, data = f"{folder}/big{SUFFIX}", secrets.token_bytes(MULTIPART_FROM + 5)
    core.storage.put(key, io.BytesIO(data), len(data))
    assert core.storage.read(key) == data
    with Copy(core.storage, key, len(data)) as copy:
        copy.write(data)
        copy.keep()
    assert b"".join(core.storage.stream(key)) == data
    assert core.storage.read(key, MULTIPART_FROM - 3, 8) == data[-8:]
    core.storage.delete([key])


def test_a_damaged_object_is_not_taken_for_whole(core, folder):
    key, data = f"{folder}/a{SUFFIX}", secrets.token_bytes(2 * FRAME)
    core.storage.put(key, io.BytesIO(data), len(data))
    stored = core.storage.stored.read(key)
    spoilt = bytearray(stored)
    spoilt[100] ^= 1
    for wrong in (bytes(spoilt), stored[:-1], stored[: encryption.HEAD + SEALED], b"short", b""):
        core.storage.stored.put(key, io.BytesIO(wrong), len(wrong))
        for ask in (core.storage.read, lambda key: list(core.storage.stream(key))):
            with pytest.raises(Unavailable) as refusal:
                ask(key)
            assert refusal.value.code == "object_damaged"
    core.storage.stored.put(f"{folder}/b{SUFFIX}", io.BytesIO(stored), len(stored))
    with pytest.raises(Unavailable, match="another name"):
        core.storage.read(f"{folder}/b{SUFFIX}")
    core.storage.delete([key, f"{folder}/b{SUFFIX}"])


# --- keys --------------------------------------------------------------------------------------


def test_rotation(core, folder):
    old, both, new = beside(core, KEYS[0]), beside(core, KEYS[1], KEYS[0]), beside(core, KEYS[1])
    data = {f"{folder}/{n}{SUFFIX}": secrets.token_bytes(FRAME * n + 9) for n in range(3)}
    for key, content in data.items():
        old.storage.put(key, io.BytesIO(content), len(content))
    reader = both.storage.read  # remembers heads
    assert {key: reader(key, FRAME, 3) for key in data} == {
        k: d[FRAME:][:3] for k, d in data.items()
    }
    with pytest.raises(Unavailable) as refusal:
        new.storage.read(f"{folder}/1{SUFFIX}")
    assert refusal.value.code == "encryption_key_missing"
    assert only(both, folder) == 3
    assert only(both, folder) == 0, "again it changes nothing"
    for key, content in data.items():
        assert new.storage.read(key) == content
        assert reader(key, FRAME, 3) == content[FRAME:][:3], "what was remembered is read again"
        with pytest.raises(Unavailable, match="ENCRYPTION_KEY"):
            old.storage.read(key)
    core.storage.delete(list(data))


def only(core, folder):
    """Encrypt anew what lies in one folder: other tests have other keys."""

    class Folder:
        stored = core.storage.stored

        def keys(self, prefix):
            return (key for key in core.storage.keys(prefix) if key.startswith(folder))

        def stream(self, key):
            return core.storage.stream(key)

    return re_encrypt(Folder(), core.ring)


def test_the_command_writes_everything_anew(core, api, terminal, monkeypatch):
    """With the key that all have already there is nothing to do."""
    Campaign(make_project(core, api), rounds=1, published=1)
    found = terminal("storage", "re-encrypt", "--json")
    assert found == {"objects": 0, "keys": core.ring.ids}
    assert "0 objects" in terminal("storage", "re-encrypt")
    monkeypatch.setenv("ENCRYPTION_KEY", "")
    assert "ENCRYPTION_KEY is not set" in str(terminal("storage", "re-encrypt", code=1).exception)


def test_without_the_key_published_versions_are_there_and_the_rest_is_not(core, api):
    """What is said of a lost key in docs/OPERATIONS.md."""
    project = make_project(core, api)
    campaign = Campaign(project, rounds=3, published=1)
    lost = replace(project, core=beside(core, KEYS[2]))
    version = campaign.versions()[-1]
    ok(project.owner.get(f"/v1/versions/{version['id']}/download"))
    findings = verify_of(lost)
    assert findings
    assert all("encryption_key" in each or "neither ENCRYPTION_KEY" in each for each in findings)
    client = campaign.clients[0]
    assignment = client.assignment()
    made = train(assignment, campaign.model.space, seed=5)
    deliver(client, assignment, made.data)
    for job in due_jobs(lost):
        running.run_job(lost.core, job)
    ((state,),) = project.sql(
        "SELECT state FROM uploads WHERE assignment_id = :id", id=assignment["id"]
    )
    assert state == "uploaded", "the mask before cannot be read: the job waits, nothing is refused"
    drain(project)
    assert problems(project) == ([], {})


def verify_of(project):
    """Why the files of one project cannot be verified."""
    rows = project.sql("SELECT object_key FROM updates WHERE project_id = :project")
    rows += project.sql("SELECT object_key FROM masks WHERE project_id = :project")
    found = []
    for (key,) in rows:
        with pytest.raises(Unavailable) as refusal:
            project.core.storage.read(key)
        found.append(f"{refusal.value.code}: {refusal.value}")
    return found


def test_a_deployment_that_gets_a_key_later_reads_what_was_stored_before(core, api):
    project = make_project(core, api)
    before = replace(project, core=beside(core))
    campaign = Campaign(before, rounds=3, published=1)
    names = {
        key for (key,) in project.sql("SELECT object_key FROM updates WHERE project_id = :project")
    }
    assert not [name for name in names if name.endswith(SUFFIX)]
    campaign.project, campaign.core = project, core
    campaign.round(1)
    campaign.round(2)
    assert [each["number"] for each in campaign.versions()] == [0, 1, 2, 3]
    for number in (1, 2, 3):
        document = ok(campaign.manifest(number))
        keys = [download["file_keys"] for download in document["downloads"].values()]
        assert any(keys) == (number > 1)
        recomputed(document, campaign.model.space)
    assert not [f for f in verify(core).findings if str(project.id) in f]


def test_who_may_have_files_of_single_clients(project):
    """An auditor's key without ``mask:read`` verifies the ledger and sees no mask."""
    campaign = Campaign(project, rounds=2, published=2)
    body = {"role": "auditor", "scopes": ["audit:read", "round:read"]}
    key = ok(project.owner.post("/v1/keys", body), 201)["key"]
    narrow = replace(project.owner, key=key)
    (found,) = [r for r in campaign.rounds() if r["number"] == 2 and r["manifest_sha256"]]
    path = f"/v1/rounds/{found['id']}/manifest"
    refused(narrow.get(path), 403, "scope_missing")
    assert ok(narrow.get(path, files=False))["downloads"] == {}
    assert ok(project.caller("auditor").get(path))["downloads"]


def test_settings_of_keys(core, tmp_path, environment):
    key = "ab" * 21 + "Q="  # 32 bytes
    wrong = [{"ENCRYPTION_KEY": "short"}, {"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_PREVIOUS": key}]
    wrong += [{"ENCRYPTION_KEY_FILE": str(tmp_path / "no")}]
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "keys").write_text(f"{key}\n{environment['ENCRYPTION_KEY']}\n")
    wrong += [{"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(tmp_path / "empty")}]
    wrong += [{"ENCRYPTION_KEY": key, "ENCRYPTION_KEY_FILE": str(tmp_path / "keys")}]
    for variables in wrong:
        with pytest.raises(SettingsError, match=r"ENCRYPTION_KEY|not both|needs") as error:
            read({**environment, **variables})
        assert key not in str(error.value)
    file = {**environment, "ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(tmp_path / "keys")}
    assert len(read(file).encryption_keys) == 2
    assert read({**environment, "ENCRYPTION_KEY": ""}).encryption_keys == ()
