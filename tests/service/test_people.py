"""People with tokens of an identity provider that really listens; keys bound to certificates."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from app.errors import Unauthorized, Unavailable
from app.main import create_app
from app.oidc import AGAIN, Issuer

from .factories import Caller, Json, Project, TestClient, make_token, ok, refused

AUDIENCE = "fedselect"


@dataclass
class Provider:
    """An OpenID provider with one key, or several."""

    port: int = 0
    keys: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    said: str | None = None  # what it calls itself, if not by its address

    @property
    def issuer(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def documents(self) -> dict[str, Json]:
        def public(kid: str, key: Any) -> Json:
            kind = "RSA" if isinstance(key, rsa.RSAPrivateKey) else "EC"
            algorithm = jwt.algorithms.RSAAlgorithm if kind == "RSA" else jwt.algorithms.ECAlgorithm
            return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}

        return {
            "/.well-known/openid-configuration": {
                "issuer": self.said or self.issuer,
                "jwks_uri": f"{self.issuer}/keys",
            },
            "/keys": {"keys": [public(kid, key) for kid, key in self.keys.items()]},
        }

    def token(
        self, subject: str = "sato", *, kid: str = "one", key: Any = None, **claims: Any
    ) -> str:
        key = key or self.keys[kid]
        now = int(time.time())
        body = {"iss": self.issuer, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 300}
        algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        return jwt.encode({**body, **claims}, key, algorithm=algorithm, headers={"kid": kid})


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def provider(rsa_key: rsa.RSAPrivateKey) -> Iterator[Provider]:
    found = Provider(keys={"one": rsa_key})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            document = found.documents().get(self.path)
            body = json.dumps(document).encode()
            self.send_response(200 if document else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield found
        server.shutdown()
        thread.join(10)


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
