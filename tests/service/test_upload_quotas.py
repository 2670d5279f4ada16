"""How often and how much one client may announce."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx

from app.main import create_app

from .conftest import MovableClock
from .factories import (
    Client,
    Project,
    TestClient,
    announce,
    make_client,
    make_model,
    make_run,
    ok,
    refused,
    train,
)


@dataclass
class Counted:
    """A client of a coordinator with small quotas, and an update that it may announce."""

    client: Client
    path: str
    data: bytes

    def announce(self, data: bytes | None = None) -> httpx.Response:
        return self.client.post(self.path, announce(self.data if data is None else data))


@contextmanager
def counted(project: Project, **limits: int) -> Iterator[Counted]:
    model = make_model(project)
    make_run(project, model, report_deadline=600_000, selection_deadline=600_000)
    client = make_client(project)
    assignment = client.assignment()
    settings = project.core.settings.model_copy(update=limits)
    app = create_app(settings)
    app.state.core.close()
    app.state.core = replace(project.core, settings=settings)
    there = Client(TestClient(app, raise_server_exceptions=False), client.key, client.id)
    path = f"/v1/assignments/{assignment['id']}/uploads"
    yield Counted(there, path, train(assignment, model.space).data)


def retry_after(response: httpx.Response) -> int:
    return int(response.headers["retry-after"])


def test_a_client_announces_so_often_a_minute_whatever_it_announces(
    project: Project, clock: MovableClock
) -> None:
    with counted(project, uploads_per_minute=3) as site:
        clock.advance(60 - clock().second)  # the beginning of a minute
        for number in range(3):
            ok(site.announce(site.data + bytes([number])), 201)
        answer = site.announce()
        assert "3 uploads" in refused(answer, 429, "upload_rate")["detail"]
        assert 0 < retry_after(answer) <= 60
        clock.advance(retry_after(answer))
        ok(site.announce(), 201)


def test_part_addresses_count_as_well(project: Project) -> None:
    with counted(project, uploads_per_minute=2) as site:
        ticket = ok(site.announce(), 201)
        path = f"/v1/uploads/{ticket['id']}/parts"
        refused(site.client.post(path), 409, "upload_whole")  # refused, so not counted
        ok(site.announce(), 201)
        refused(site.client.post(path), 429, "upload_rate")


def test_a_client_announces_so_many_bytes_a_day_and_replacing_gives_none_back(
    project: Project, clock: MovableClock
) -> None:
    with counted(project, upload_bytes_per_day=2_000) as site:
        today = clock()
        clock.advance(86_400 - today.hour * 3600 - today.minute * 60 - today.second)
        size = len(site.data)
        for _ in range(2_000 // size):
            ok(site.announce(), 201)
        answer = site.announce()
        assert (
            f"{2_000 // size * size} of the 2000 bytes"
            in refused(answer, 429, "upload_quota")["detail"]
        )
        assert 86_300 < retry_after(answer) <= 86_400
        clock.advance(86_400)
        ok(site.announce(), 201)


def test_a_file_beyond_a_whole_days_quota_is_too_large(project: Project) -> None:
    with counted(project, upload_bytes_per_day=100) as site:
        refused(site.announce(), 413, "upload_too_large")
