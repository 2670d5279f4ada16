"""Bad files at the door: each is refused with its own reason, and the round goes on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from app.signing import Signer
from fedselect import Mask, wire
from fedselect.lifecycle import COMPLETED

from .conftest import MovableClock
from .factories import (
    Client,
    Json,
    Model,
    Project,
    TestClient,
    announce,
    ask_store,
    complete,
    contribute,
    deliver,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    make_project,
    make_run,
    meta,
    ok,
    pass_time,
    put,
    refused,
    train,
    upload,
)

# --- forging -----------------------------------------------------------------------------------


@dataclass
class Forgery:
    """The parts of an honest update file, to be changed one at a time."""

    model: Model
    assignment: Json
    mask: Mask
    metadata: dict[str, Any]
    sections: dict[str, tuple[str, Any]]

    @classmethod
    def of(cls, model: Model, assignment: Json) -> Forgery:
        made = train(assignment, model.space)
        names = (n for n in wire.UPDATE_FIELDS if n != "format")
        metadata = {n: str(getattr(meta(assignment), n)) for n in names}
        metadata["format"] = wire.UPDATE_FORMAT
        sections = {
            "block_rank": ("U64", made.mask.block_rank().astype("<u8")),
            "values": ("F32", made.theta[~made.mask.to_bool()]),
            "mask": ("U8", made.mask.packed.copy()),
        }
        return cls(
            model, assignment, made.mask, {"format": wire.UPDATE_FORMAT, **metadata}, sections
        )

    def replace(self, name: str, array: Any) -> None:
        self.sections[name] = (self.sections[name][0], array)

    def use_mask(self, personal: Any) -> None:
        """Another mask, with all that follows from it."""
        mask = Mask.from_bool(personal)
        self.replace("block_rank", mask.block_rank().astype("<u8"))
        self.replace("mask", mask.packed)
        self.replace("values", np.zeros(mask.shared, dtype="<f4"))

    def to_bytes(self, **extra: Any) -> bytes:
        """Safetensors as docs/WIRE.md describes it, written here without the product's help."""
        header: Json = {"__metadata__": dict(sorted(self.metadata.items()))}
        offset, body = 0, b""
        for name, (dtype, array) in self.sections.items():
            stop = offset + array.nbytes
            header[name] = {"dtype": dtype, "shape": [array.size], "data_offsets": [offset, stop]}
            offset, body = stop, body + array.tobytes()
        header.update(extra)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body


Forge = Callable[[Forgery], bytes]


def says(**changes: str) -> Forge:
    """A file that says something else of itself."""

    def forge(f: Forgery) -> bytes:
        f.metadata.update(changes)
        return f.to_bytes()

    return forge


def bytes_of(change: Callable[[bytes], bytes]) -> Forge:
    return lambda f: change(f.to_bytes())


def values(change: Callable[[Any], Any]) -> Forge:
    def forge(f: Forgery) -> bytes:
        f.replace("values", np.ascontiguousarray(change(f.sections["values"][1]), dtype="<f4"))
        return f.to_bytes()

    return forge


def poisoned(value: float) -> Forge:
    def change(honest: Any) -> Any:
        bad = honest.copy()
        bad[-1] = value
        return bad

    return values(change)


def masks(name: str, personal: bool) -> Forge:
    """A file whose mask says of one tensor what the policy forbids."""

    def forge(f: Forgery) -> bytes:
        bits = f.mask.to_bool().copy()
        slot = f.model.space.by_name[name]
        bits[slot.offset] = personal
        f.use_mask(bits)
        return f.to_bytes()

    return forge


def padding(f: Forgery) -> bytes:
    packed = f.mask.packed.copy()
    packed[-1] |= 0x80
    f.replace("mask", packed)
    return f.to_bytes()


def wrong_rank(f: Forgery) -> bytes:
    f.replace("block_rank", f.sections["block_rank"][1] + np.array([0, 1], dtype="<u8"))
    return f.to_bytes()


def short_rank(f: Forgery) -> bytes:
    f.replace("block_rank", f.sections["block_rank"][1][:1])
    return f.to_bytes()


def extra_tensor(f: Forgery) -> bytes:
    f.sections["theta_personal"] = ("F32", np.zeros(3, dtype="<f4"))
    return f.to_bytes()


def without(name: str) -> Forge:
    def forge(f: Forgery) -> bytes:
        del f.sections[name]
        return f.to_bytes()

    return forge


def long_mask(f: Forgery) -> bytes:
    f.replace("mask", np.zeros(f.mask.packed.size + 1, dtype=np.uint8))
    return f.to_bytes()


def version_file(f: Forgery) -> bytes:
    return wire.encode_version(f.model.space.digest, f.model.weights + 1)


def doubled_key(f: Forgery) -> bytes:
    return f.to_bytes().replace(b'"shape":[', b'"dtype":"U64","shape":[', 1)


OTHER = "0" * 64
BAD: dict[str, tuple[str, Forge]] = {
    "another space": ("space_mismatch", says(space=OTHER)),
    "another base version": ("base_version_mismatch", says(base_version=OTHER)),
    "another round": ("round_mismatch", says(round="2")),
    "another run": ("run_mismatch", says(run="00000000-0000-0000-0000-000000000000")),
    "another assignment": ("assignment_mismatch", says(assignment="mine")),
    "another encoding": ("encoding_unknown", says(encoding="int8")),
    "no examples": ("header_invalid", says(examples="0")),
    "examples that are no number": ("header_invalid", says(examples="1e3")),
    "unprintable text": ("space_mismatch", says(space="\0\ud800")),
    "mask version 2 at first": ("mask_version_mismatch", says(mask_version="2")),
    "a field too many": ("header_invalid", says(note="hello")),
    "another format": ("format_unknown", says(format="fedselect-update/9")),
    "a version file": ("format_unknown", version_file),
    "one byte missing": ("file_truncated", bytes_of(lambda data: data[:-1])),
    "ends in the header": ("file_truncated", bytes_of(lambda data: data[:100])),
    "five bytes": ("file_truncated", bytes_of(lambda data: data[:5])),
    "one byte too many": ("file_trailing", bytes_of(lambda data: data + b"\0")),
    "an extra tensor": ("tensor_unexpected", extra_tensor),
    "no values": ("tensor_missing", without("values")),
    "no block_rank": ("tensor_missing", without("block_rank")),
    "no mask at first": ("mask_missing", without("mask")),
    "one value too many": ("values_length", values(lambda v: np.append(v, 0))),
    "one value too few": ("values_length", values(lambda v: v[:-1])),
    "more values than elements": ("values_length", values(lambda v: np.zeros(500))),
    "padding bits": ("mask_padding", padding),
    "a mask too long": ("mask_size", long_mask),
    "NaN": ("values_not_finite", poisoned(float("nan"))),
    "infinity": ("values_not_finite", poisoned(float("-inf"))),
    "shares running statistics": ("mask_not_allowed", masks("norm.running_mean", False)),
    "keeps a bias": ("mask_not_allowed", masks("layer.bias", True)),
    "wrong block_rank": ("block_rank_invalid", wrong_rank),
    "short block_rank": ("block_rank_invalid", short_rank),
    "header of 1 GiB": ("header_oversize", bytes_of(lambda d: struct.pack("<Q", 2**30) + d[8:])),
    "header of 2^64 - 1": ("header_oversize", bytes_of(lambda d: b"\xff" * 8 + d[8:])),
    "header is no JSON": ("header_invalid", bytes_of(lambda d: d[:8] + b"!" + d[9:])),
    "header is not UTF-8": ("header_invalid", bytes_of(lambda d: d[:9] + b"\xff" + d[10:])),
    "header with a key twice": (
        "header_invalid",
        lambda f: _resized(doubled_key(f), by=len(b'"dtype":"U64",')),
    ),
    "header with spaces": ("header_invalid", lambda f: _spaced(f.to_bytes())),
    "offsets with a hole": (
        "header_invalid",
        lambda f: f.to_bytes(mask={"dtype": "U8", "shape": [10], "data_offsets": [900, 910]}),
    ),
    "nothing but zeros": ("header_invalid", lambda f: b"\0" * 500),
}


def _resized(data: bytes, *, by: int) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    return struct.pack("<Q", size + by) + data[8:]


def _spaced(data: bytes) -> bytes:
    return _resized(data[:8] + b'{ "' + data[10:], by=1)


# --- one round that takes them all -------------------------------------------------------------


@dataclass
class Gathering:
    """A round that waits for more clients than will ever come."""

    project: Project
    model: Model
    run: Json

    def joined(self) -> tuple[Client, Json]:
        client = make_client(self.project)
        return client, client.assignment()

    def round_detail(self) -> Json:
        first = everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")[-1]
        return dict(ok(self.project.owner.get(f"/v1/rounds/{first['id']}")))

    def assert_rejected(self, client: Client, assignment: Json, ticket: Json, reason: str) -> None:
        """Client and administrator see the reason, and the file is kept nowhere."""
        status = ok(client.get(f"/v1/uploads/{ticket['id']}"))
        assert (status["state"], status["reason"]) == ("rejected", reason), status
        assert status["detail"]
        assert ok(self.project.owner.get(f"/v1/uploads/{ticket['id']}")) == status
        answer = client.check_in(pending=assignment["id"])
        assert (answer["pending"]["state"], answer["pending"]["reason"]) == ("rejected", reason)
        assert answer["assignment"] is None
        detail = self.round_detail()
        (shown,) = [a for a in detail["assignments"] if a["id"] == assignment["id"]]
        assert (shown["client_name"], shown["state"]) == (client.name, "rejected")
        assert (shown["reason"], shown["detail"]) == (reason, status["detail"])
        assert shown["upload_id"] == ticket["id"]
        assert detail["state"] == "selecting", "the round goes on"


@pytest.fixture(scope="module")
def gathering(core: Any, api: TestClient) -> Gathering:
    project = make_project(core, api)
    model = make_model(project)
    return Gathering(project, model, make_run(project, model, goal=1000, quorum=2))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_own_reason(gathering: Gathering, case: str) -> None:
    reason, forge = BAD[case]
    client, assignment = gathering.joined()
    data = forge(Forgery.of(gathering.model, assignment))
    ticket = deliver(client, assignment, data)
    drain(gathering.project)
    gathering.assert_rejected(client, assignment, ticket, reason)
    assert complete(client, ticket)["state"] == "rejected", "completing again changes nothing"
    project = gathering.project
    kept = f"accepted/{project.id}/{announce(data)['sha256']}"
    assert not list(project.core.storage.keys(kept))


def test_the_forger_can_write_an_honest_file(gathering: Gathering) -> None:
    client, assignment = gathering.joined()
    data = Forgery.of(gathering.model, assignment).to_bytes()
    assert data == train(assignment, gathering.model.space).data
    ticket = deliver(client, assignment, data)
    drain(gathering.project)
    assert ok(client.get(f"/v1/uploads/{ticket['id']}"))["state"] == "accepted"


def test_complete_without_a_file(gathering: Gathering) -> None:
    client, assignment = gathering.joined()
    data = train(assignment, gathering.model.space).data
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(client.post(path, announce(data)), 201)
    assert complete(client, ticket)["state"] == "uploaded"
    drain(gathering.project)
    gathering.assert_rejected(client, assignment, ticket, "upload_missing")
    refused(client.post(path, announce(data)), 409, "assignment_rejected")


def test_another_clients_file_is_refused(gathering: Gathering) -> None:
    """A copied update does not count twice: it names the assignment it was made for."""
    (honest, first), (thief, second) = gathering.joined(), gathering.joined()
    data = train(first, gathering.model.space).data
    deliver(honest, first, data)
    ticket = deliver(thief, second, data)
    drain(gathering.project)
    gathering.assert_rejected(thief, second, ticket, "assignment_mismatch")


@pytest.mark.parametrize(
    ("reason", "forge"),
    [
        ("mask_version_mismatch", lambda a, s: train(a, s, mask_version=1)),
        ("mask_version_mismatch", lambda a, s: train(a, s, send_mask=False, mask_version=2)),
        ("values_length", lambda a, s: train(a, s, mask=Mask.initial(s), send_mask=False)),
    ],
)
def test_a_second_update_must_fit_the_mask_that_is_known(
    project: Project, reason: str, forge: Any
) -> None:
    model = make_model(project)
    make_run(project, model, rounds=2)
    clients = make_clients(project, 2)
    for number, client in enumerate(clients):
        contribute(client, model, seed=number)
    drain(project)
    assignment = clients[0].assignment()
    assert assignment["mask"]["version"] == 1
    made = forge(assignment, model.space)
    ticket = deliver(clients[0], assignment, made.data)
    drain(project)
    assert ok(clients[0].get(f"/v1/uploads/{ticket['id']}"))["reason"] == reason


# --- at the store's door -----------------------------------------------------------------------


@pytest.fixture
def reserved(gathering: Gathering) -> tuple[Client, Json, bytes, Json]:
    """A client that has announced a file and not sent it yet."""
    client, assignment = gathering.joined()
    data = train(assignment, gathering.model.space).data
    path = f"/v1/assignments/{assignment['id']}/uploads"
    return client, assignment, data, ok(client.post(path, announce(data)), 201)


def _with(ticket: Json, *, url: str | None = None, **headers: str) -> Json:
    return {"url": url or ticket["url"], "headers": {**ticket["headers"], **headers}}


def _attack(name: str, ticket: Json, data: bytes) -> httpx.Response:
    url = ticket["url"]
    parts = urlsplit(url)
    tampered = bytes([data[0] ^ 1]) + data[1:]
    md5 = "AAAAAAAAAAAAAAAAAAAAAA=="
    if name == "tampered body":
        return put(ticket, tampered)
    if name == "tampered body with its own md5":
        return put(_with(ticket, **{"content-md5": md5}), tampered)
    if name == "without md5":
        headers = {k: v for k, v in ticket["headers"].items() if k != "content-md5"}
        return put({"url": url, "headers": headers}, tampered)
    if name == "longer":
        return put(_with(ticket, **{"content-length": str(len(data) + 1)}), data + b"!")
    if name == "shorter":
        return put(_with(ticket, **{"content-length": str(len(data) - 1)}), data[:-1])
    if name in {"GET", "DELETE", "POST"}:
        return ask_store(name, url, headers=ticket["headers"], content=data)
    if name == "another key":
        other = url.replace(parts.path, parts.path[:-1] + ("0" if parts.path[-1] != "0" else "1"))
        return put(_with(ticket, url=other), data)
    if name == "into accepted":
        return put(_with(ticket, url=url.replace("/staging/", "/accepted/")), data)
    if name == "without signature":
        return put(_with(ticket, url=url.partition("?")[0]), data)
    assert name == "a longer life"
    return put(_with(ticket, url=url.replace("X-Amz-Expires=", "X-Amz-Expires=9")), data)


@pytest.mark.parametrize(
    "attack",
    [
        "tampered body",
        "tampered body with its own md5",
        "without md5",
        "longer",
        "shorter",
        "GET",
        "DELETE",
        "POST",
        "another key",
        "into accepted",
        "without signature",
        "a longer life",
    ],
)
def test_the_store_admits_only_what_was_announced(
    gathering: Gathering, reserved: tuple[Client, Json, bytes, Json], attack: str
) -> None:
    client, _, data, ticket = reserved
    answer = _attack(attack, ticket, data)
    assert 400 <= answer.status_code < 500, answer.text
    key = urlsplit(ticket["url"]).path.split("/", 2)[2]
    storage = gathering.project.core.storage
    assert key not in set(storage.keys(key)), "nothing was written"
    assert put(ticket, data).status_code == 200, "the honest file is still admitted"
    complete(client, ticket)
    drain(gathering.project)
    assert ok(client.get(f"/v1/uploads/{ticket['id']}"))["state"] == "accepted"


def test_an_expired_address_is_refused(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address was signed an hour ago for 900 seconds: the store's clock is the real one."""
    client, assignment = gathering.joined()
    data = train(assignment, gathering.model.space).data
    sign, hour = Signer.sign, timedelta(hours=1)

    def an_hour_ago(self: Signer, *target: str, until: datetime, **pinned: Any) -> str:
        since = datetime.now(UTC) - hour
        return sign(self, *target, until=until - hour, since=since, **pinned)

    monkeypatch.setattr(Signer, "sign", an_hour_ago)
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(client.post(path, announce(data)), 201)
    monkeypatch.undo()
    assert put(ticket, data).status_code == 403
    fresh = upload(client, path, data)
    assert fresh["id"] == ticket["id"], "asking again gives a new address for the same upload"
    complete(client, fresh)
    drain(gathering.project)
    assert ok(client.get(f"/v1/uploads/{ticket['id']}"))["state"] == "accepted"


def test_an_address_that_was_replaced_reaches_nothing(gathering: Gathering) -> None:
    """Announcing another file gives another address; the old one leads to another place."""
    client, assignment = gathering.joined()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    first = train(assignment, gathering.model.space, seed=1).data
    second = train(assignment, gathering.model.space, seed=2).data
    old = ok(client.post(path, announce(first)), 201)
    new = upload(client, path, second)
    assert put(old, first).status_code == 200
    complete(client, new)
    drain(gathering.project)
    assert ok(client.get(f"/v1/uploads/{new['id']}"))["state"] == "accepted"
    sent = gathering.project.sql("SELECT sha256 FROM updates WHERE client_id = :c", c=client.id)
    assert sent == [(announce(second)["sha256"],)]


def test_an_address_never_outlives_the_deadline(project: Project, clock: MovableClock) -> None:
    model = make_model(project)
    make_run(project, model, selection_deadline=600, report_deadline=1200)
    (client,) = make_clients(project, 1)
    assignment = client.assignment()
    clock.advance(1500)
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(client.post(path, announce(train(assignment, model.space).data)), 201)
    assert ticket["expires_at"] <= assignment["deadline"]
    clock.advance(300)
    refused(client.post(path, announce(b"x")), 409, "assignment_expired")


# --- what is announced ------------------------------------------------------------------------


def test_an_upload_larger_than_any_update(gathering: Gathering) -> None:
    client, assignment = gathering.joined()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    body = {**announce(b"x"), "size": 10**7}
    refused(client.post(path, body), 413, "upload_too_large")
    refused(client.post(path, {**body, "size": 2**60}), 422, "request_invalid")
    refused(client.post(path, {**body, "size": 0}), 422, "request_invalid")
    assert client.assignment()["state"] == "assigned", "nothing was reserved"


@pytest.mark.parametrize("change", [{"md5": "X" * 32}, {"sha256": "a" * 63}, {"md5": "a" * 33}])
def test_digests_that_are_none(gathering: Gathering, change: Json) -> None:
    client, assignment = gathering.joined()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    refused(client.post(path, {**announce(b"x"), **change}), 422, "request_invalid")


def test_a_digest_that_does_not_fit_the_file(gathering: Gathering) -> None:
    """Length and md5 fit, so that the store admits it: the worker finds out."""
    client, assignment = gathering.joined()
    data = train(assignment, gathering.model.space).data
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(client.post(path, {**announce(data), "sha256": OTHER}), 201)
    assert put(ticket, data).status_code == 200
    complete(client, ticket)
    drain(gathering.project)
    gathering.assert_rejected(client, assignment, ticket, "upload_digest")


# --- the round goes on -------------------------------------------------------------------------


def test_a_round_publishes_with_the_others(project: Project, clock: MovableClock) -> None:
    model = make_model(project)
    run = make_run(project, model, goal=3, quorum=2)
    good, bad = make_clients(project, 2), make_client(project)
    assignment = bad.assignment()
    deliver(bad, assignment, train(assignment, model.space, space=OTHER).data)
    for number, client in enumerate(good):
        contribute(client, model, seed=number)
    drain(project)
    found = ok(project.owner.get(f"/v1/runs/{run['id']}"))
    assert (found["state"], found["published"]) == ("evaluating", 1)
    first = everything(project.owner, f"/v1/runs/{run['id']}/rounds")[0]
    manifest = ok(project.owner.get(f"/v1/rounds/{first['id']}/manifest"))["manifest"]
    assert [u["client"] for u in manifest["updates"]] == [c.id for c in good]
    assert [u["number"] for u in manifest["updates"]] == [1, 2]


def test_a_round_below_its_quorum_is_tried_again_from_the_same_version(project: Project) -> None:
    model = make_model(project)
    run = make_run(project, model, goal=2, quorum=2)
    clients = make_clients(project, 2)
    good = contribute(clients[0], model, seed=1)
    assignment = clients[1].assignment()
    deliver(clients[1], assignment, train(assignment, model.space, space=OTHER).data)
    drain(project)
    first, second = everything(project.owner, f"/v1/runs/{run['id']}/rounds")
    assert (first["state"], second["state"]) == ("abandoned", "selecting")
    assert (first["number"], first["attempt"]) == (1, 1)
    assert (second["number"], second["attempt"]) == (1, 2)
    assert first["base_version_id"] == second["base_version_id"]
    outcome = clients[0].check_in(pending=good["id"])
    assert (outcome["pending"]["state"], outcome["pending"]["round_state"]) == (
        "accepted",
        "abandoned",
    ), "the good client hears that its update did not count"
    for number, client in enumerate(clients):
        contribute(client, model, seed=number)
    drain(project)
    assert ok(project.owner.get(f"/v1/runs/{run['id']}"))["published"] == 1


def test_the_mask_of_an_abandoned_round_stays_known(project: Project) -> None:
    """An accepted mask has a number for good: the client must count on from there."""
    model = make_model(project)
    make_run(project, model, goal=2, quorum=2)
    clients = make_clients(project, 2)
    contribute(clients[0], model, seed=1)
    bad = clients[1].assignment()
    deliver(clients[1], bad, train(bad, model.space, space=OTHER).data)
    drain(project)
    assert clients[0].assignment()["mask"]["version"] == 1
    assert clients[1].assignment()["mask"] is None


# --- initial weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("space_mismatch", lambda m: wire.encode_version("\0" * 64, m.weights)),
        ("space_mismatch", lambda m: wire.encode_version(OTHER, m.weights)),
        ("values_length", lambda m: wire.encode_version(m.space.digest, m.weights[:-1])),
        ("file_truncated", lambda m: wire.encode_version(m.space.digest, m.weights)[:-4]),
        ("file_trailing", lambda m: wire.encode_version(m.space.digest, m.weights) + b"abcd"),
        (
            "values_not_finite",
            lambda m: wire.encode_version(m.space.digest, m.weights)[:-4] + b"\0\0\x80\x7f",
        ),
        ("header_invalid", lambda m: b"\0" * 100),
    ],
)
def test_bad_weights(project: Project, reason: str, make: Any) -> None:
    pattern = make_model(project)
    body = {"name": "second", "space": pattern.space.to_json()}
    model = ok(project.owner.post("/v1/models", body), 201)
    path = f"/v1/models/{model['id']}/uploads"
    ticket = upload(project.owner, path, make(pattern))
    complete(project.owner, ticket)
    drain(project)
    status = ok(project.owner.get(f"/v1/uploads/{ticket['id']}"))
    assert (status["state"], status["reason"]) == ("rejected", reason), status
    assert status["detail"]
    refused(
        project.owner.post("/v1/runs", {"name": "r", "model_id": model["id"]}),
        409,
        "model_without_weights",
    )
    good = upload(project.owner, path, wire.encode_version(pattern.space.digest, pattern.weights))
    complete(project.owner, good)
    drain(project)
    assert ok(project.owner.get(f"/v1/uploads/{good['id']}"))["state"] == "accepted"
    refused(project.owner.post(path, announce(b"x")), 409, "model_has_weights")


def test_of_two_weight_files_the_first_counts(project: Project) -> None:
    pattern = make_model(project)
    model = ok(project.owner.post("/v1/models", {"name": "m2", "space": pattern.space.to_json()}))
    path = f"/v1/models/{model['id']}/uploads"
    data = wire.encode_version(pattern.space.digest, pattern.weights)
    tickets = [upload(project.owner, path, data) for _ in range(2)]
    for ticket in tickets:
        complete(project.owner, ticket)
    drain(project)
    found = [ok(project.owner.get(f"/v1/uploads/{t['id']}")) for t in tickets]
    assert sorted(s["state"] for s in found) == ["accepted", "rejected"]
    assert {s["reason"] for s in found} == {None, "model_has_weights"}
    actions = [
        a for (a,) in project.sql("SELECT action FROM ledger_entries WHERE project_id = :project")
    ]
    assert "upload.rejected" in actions, "a refusal is in the ledger, too"


def test_completed_states_are_final(gathering: Gathering) -> None:
    """Every state in which a client may find its completed upload is one it was told of."""
    assert {s.value for s in COMPLETED} == {"uploaded", "accepted", "rejected", "late"}
    pass_time(gathering.project)
    assert gathering.round_detail()["state"] == "selecting"
