"""People with tokens of an identity provider that really listens; keys bound to certificates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from app.errors import Unauthorized, Unavailable
from app.main import create_app
from app.oidc import AGAIN, FRESH, STALE, Issuer

from .factories import Caller, Json, Project, TestClient, make_token, ok, refused
from .provider import AUDIENCE, Provider, listening


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def provider(rsa_key: rsa.RSAPrivateKey) -> Iterator[Provider]:
    with listening(Provider(keys={"one": rsa_key})) as found:
        yield found


@pytest.fixture
def house(project: Project, provider: Provider) -> Iterator[TestClient]:
    """A coordinator that believes this provider, and a proxy's header."""
    changes = {"oidc_issuer": provider.issuer, "mtls_header": "X-Certificate"}
    settings = project.core.settings.model_copy(update=changes)
    with TestClient(create_app(settings), raise_server_exceptions=False) as api:
        yield api


def add(house: TestClient, by: Caller, subject: str = "sato", **body: Any) -> Json:
    caller = Caller(house, by.key, names=by.names)
    return dict(ok(caller.post("/v1/members", {"subject": subject, "role": "viewer", **body}), 201))


# --- members -----------------------------------------------------------------------------------


def test_a_person_may_what_their_membership_says(
    house: TestClient, project: Project, provider: Provider
) -> None:
    sato = Caller(house, provider.token())
    refused(sato.get("/v1/runs"), 403, "member_unknown")
    member = add(house, project.owner, name="Dr. Sato")
    ok(sato.get("/v1/runs"))
    refused(sato.post("/v1/enrolments", {}), 403, "scope_missing")
    me = ok(sato.get("/v1/me"))
    assert (me["kind"], me["id"], me["role"]) == ("person", member["id"], "viewer")
    assert me["project_id"] == str(project.id)
    twice = Caller(house, project.owner.key).post(
        "/v1/members", {"subject": "sato", "role": "owner"}
    )
    refused(twice, 409, "member_exists")
    ok(Caller(house, project.owner.key).post(f"/v1/members/{member['id']}/end"))
    refused(sato.get("/v1/runs"), 403, "member_unknown")


def test_what_a_person_does_is_theirs_in_the_ledger(
    house: TestClient, project: Project, provider: Provider
) -> None:
    member = add(house, project.owner, role="operator")
    ok(Caller(house, provider.token()).post("/v1/enrolments", {}), 201)
    query = (
        "SELECT actor FROM ledger_entries WHERE project_id = :project"
        " AND action = 'enrolment.created'"
    )
    assert project.sql(query) == [(f"member:{member['id']}",)]
    refused(Caller(house, provider.token()).post("/v1/me/key", {}), 404, "not_found")


def test_a_member_of_several_projects_names_one(
    house: TestClient, project: Project, other: Project, provider: Provider
) -> None:
    add(house, project.owner)
    add(house, other.owner, role="operator")
    token = provider.token()
    refused(Caller(house, token).get("/v1/runs"), 422, "project_required")
    ok(Caller(house, token, names=other.id).post("/v1/enrolments", {}), 201)
    mine = Caller(house, token, names=project.id)
    refused(mine.post("/v1/enrolments", {}), 403, "scope_missing")
    nowhere = Caller(house, token, names="00000000-0000-4000-8000-000000000000")
    refused(nowhere.get("/v1/runs"), 404, "not_found")


def test_a_member_of_an_organisation(
    house: TestClient, project: Project, other: Project, provider: Provider
) -> None:
    boss = project.organisation(names=project.id)
    add(house, boss, role="owner", organisation=True)
    token = provider.token()
    assert ok(Caller(house, token).get("/v1/me"))["project_id"] is None
    made = ok(Caller(house, token).post("/v1/projects", {"name": "by-sato"}), 201)
    ok(Caller(house, token, names=made["id"]).get("/v1/runs"))
    refused(Caller(house, token, names=other.id).get("/v1/runs"), 404, "not_found")
    refused(
        Caller(house, project.owner.key).post(
            "/v1/members", {"subject": "x", "role": "viewer", "organisation": True}
        ),
        403,
        "organisation_key_needed",
    )


# --- tokens ------------------------------------------------------------------------------------


def test_tokens_that_are_not_good(house: TestClient, project: Project, provider: Provider) -> None:
    add(house, project.owner)
    stranger = ec.generate_private_key(ec.SECP256R1())
    now = int(time.time())
    bad = {
        "another key": provider.token(key=stranger),
        "another audience": provider.token(aud="somebody"),
        "another issuer": provider.token(iss="https://elsewhere.example"),
        "no end": provider.token(exp=None),
        "from the future": provider.token(iat=now + 3600, nbf=now + 3600),
        "no subject": provider.token(sub=None),
        "no signature": provider.token().rpartition(".")[0] + ".AAAA",
        "shared secret": jwt.encode({"sub": "sato"}, "x" * 40, algorithm="HS256"),
        "none": jwt.encode({"sub": "sato"}, None, algorithm="none"),
    }
    for what, token in bad.items():
        answer = Caller(house, token).get("/v1/runs")
        assert answer.status_code == 401, what
        assert answer.json()["code"] in {"token_invalid", "key_unknown"}, what
    refused(Caller(house, provider.token(exp=now - 60)).get("/v1/runs"), 401, "token_expired")
    ok(Caller(house, provider.token()).get("/v1/runs"))


def test_keys_of_the_issuer_are_kept_and_renewed(provider: Provider) -> None:
    now = [0.0]
    issuer = Issuer(provider.issuer, AUDIENCE, clock=lambda: now[0])
    for _ in range(3):
        found = issuer.person(f"Bearer {provider.token()}")
        assert found is not None
        assert found.subject == "sato"
    assert len(provider.asked) == 2, "the discovery document and the keys, once"
    provider.keys["two"] = ec.generate_private_key(ec.SECP256R1())
    token = f"Bearer {provider.token(kid='two')}"
    with pytest.raises(Unauthorized):
        issuer.person(token)
    assert len(provider.asked) == 2, "anybody can invent a key: it is not asked for at once"
    now[0] += AGAIN + 1
    assert issuer.person(token) is not None
    assert issuer.person("Bearer fsk_x") is None
    assert issuer.person(None) is None


def test_an_issuer_that_is_away_or_another(
    provider: Provider, house: TestClient, project: Project
) -> None:
    provider.said = "https://elsewhere.example"
    with pytest.raises(Unavailable):
        Issuer(provider.issuer, AUDIENCE).person(f"Bearer {provider.token()}")
    refused(Caller(house, provider.token()).get("/v1/runs"), 503, "issuer_unavailable")
    ok(Caller(house, project.owner.key).get("/v1/runs"))


def test_an_issuer_that_goes_away_is_not_asked_by_every_call(provider: Provider) -> None:
    """Its keys go on for a day. Anybody may send a token that makes us look for its key."""
    now = [0.0]
    issuer = Issuer(provider.issuer, AUDIENCE, clock=lambda: now[0])
    good, invented = f"Bearer {provider.token()}", jwt.encode({}, "x" * 40, algorithm="HS256")
    assert issuer.person(good) is not None
    provider.said, provider.asked = "https://elsewhere.example", []
    now[0] += FRESH + 1
    for _ in range(5):
        assert issuer.person(good) is not None
        with pytest.raises(Unauthorized):
            issuer.person(f"Bearer {invented}")
    assert len(provider.asked) == 1
    now[0] += AGAIN + 1
    assert issuer.person(good) is not None
    assert len(provider.asked) == 2
    now[0] += STALE
    for _ in range(5):
        with pytest.raises(Unavailable):
            issuer.person(good)
    assert len(provider.asked) == 3
    provider.said = None
    now[0] += AGAIN + 1
    assert issuer.person(good) is not None


def test_without_an_issuer_tokens_are_nothing(project: Project, provider: Provider) -> None:
    refused(Caller(project.api, provider.token()).get("/v1/runs"), 401, "key_unknown")
    body = {"subject": "sato", "role": "viewer"}
    refused(project.owner.post("/v1/members", body), 409, "no_issuer")


# --- certificates --------------------------------------------------------------------------------


def test_a_key_bound_to_a_certificate(house: TestClient, project: Project) -> None:
    owner = Caller(house, project.owner.key)
    mine, shown = "ab" * 32, ":".join(["AB"] * 32)
    body = {"role": "viewer", "certificate": mine}
    bound = Caller(house, ok(owner.post("/v1/keys", body), 201)["key"])
    assert ok(bound.request("GET", "/v1/me", **{"X-Certificate": shown}))["role"] == "viewer"
    for said in ({}, {"X-Certificate": "cd" * 32}, {"X-Certificate": "nonsense"}):
        answer = bound.request("GET", "/v1/me", **said)
        refused(answer, 401, "certificate_mismatch")
    plain = Caller(project.api, bound.key)  # a coordinator that is behind no such proxy
    answer = plain.request("GET", "/v1/me", **{"X-Certificate": mine})
    refused(answer, 401, "certificate_mismatch")


def test_a_client_that_registers_with_a_certificate_is_bound_to_it(
    house: TestClient, project: Project
) -> None:
    body = {"token": make_token(project), "name": "with-certificate"}
    said = {"X-Certificate": "ab" * 32}
    answer = ok(Caller(house, None).request("POST", "/v1/clients", body, **said), 201)
    client = Caller(house, answer["key"])
    refused(client.post("/v1/check-ins", {}), 401, "certificate_mismatch")
    ok(client.request("POST", "/v1/check-ins", {}, **said))
    rotated = ok(client.request("POST", "/v1/me/key", {}, **said), 201)
    refused(Caller(house, rotated["key"]).get("/v1/me"), 401, "certificate_mismatch")
