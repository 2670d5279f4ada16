"""The page of the API's description: complete without the internet, no foreign code in it."""

from __future__ import annotations

import re

from .factories import TestClient


def test_the_page_loads_nothing_from_elsewhere(api: TestClient) -> None:
    page = api.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page.text)
    assert len(addresses) >= 4  # style, script, icon, description
    for address in addresses:
        assert address.startswith("/"), address
        assert len(api.get(address).content) > 1000


def test_the_page_can_send_a_key(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    operations = {
        operation["operationId"]: operation.get("security")
        for path in document["paths"].values()
        for operation in path.values()
    }
    without = {name for name, security in operations.items() if security != [{"key": []}]}
    assert without == {"registerClient", "live", "ready"}


def test_every_answer_is_safe_in_a_browser(api: TestClient) -> None:
    foreign = {"Origin": "https://elsewhere.example"}
    for path, allowed in (("/health/live", "'none'"), ("/v1/runs", "'none'"), ("/docs", "'self'")):
        headers = api.get(path, headers=foreign).headers
        assert headers["content-security-policy"].startswith(f"default-src {allowed}")
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert not [name for name in headers if name.startswith("access-control-")]
    assert api.options("/v1/runs", headers=foreign).status_code == 405
