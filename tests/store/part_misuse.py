"""Misuse of the addresses of parts: a large file as its sender and others may treat it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import numpy as np
from service.factories import (
    Json,
    Project,
    announce,
    ask_store,
    make_space,
    numbers,
    ok,
    piece_of,
    put,
)

from app.signing import Signer, pinned
from fedselect import wire
from fedselect.protocol import MULTIPART_FROM

ROWS = MULTIPART_FROM // (3 * 4) + 100  # of a model whose weights go in parts


@dataclass
class LargeFile:
    """The weights of a model on their way, in parts."""

    project: Project
    model: Json
    data: bytes
    ticket: Json
    parts: list[Json]

    @classmethod
    def announced(cls, project: Project) -> LargeFile:
        space = make_space(rows=ROWS)
        body = {"name": f"large-{next(numbers)}", "space": space.to_json()}
        model = ok(project.owner.post("/v1/models", body), 201)
        values = np.frombuffer(secrets.token_bytes(1024) * (4 * space.dim // 1024 + 1), "<u2")
        theta = (values[: space.dim] / 2**16).astype(np.float32)
        data = wire.encode_version(space.digest, theta)
        path = f"/v1/models/{model['id']}/uploads"
        ticket = ok(project.owner.post(path, announce(data)), 201)
        file = cls(project, model, data, ticket, [])
        file.parts = file.lacking()
        return file

    def lacking(self) -> list[Json]:
        """The parts that the coordinator still asks for."""
        path = f"/v1/uploads/{self.ticket['id']}/parts"
        return list(ok(self.project.owner.post(path))["parts"])

    def send(self, part: Json, data: bytes | None = None, **changed: str) -> int:
        """PUT a part with something changed."""
        headers = {**part["headers"], **{k.replace("_", "-"): v for k, v in changed.items()}}
        body = piece_of(self.data, part) if data is None else data
        return put({"url": part["url"], "headers": headers}, body).status_code

    def state(self) -> str:
        return str(ok(self.project.owner.get(f"/v1/uploads/{self.ticket['id']}"))["state"])


def forged(file: LargeFile, part: Json) -> bytes:
    """A body of the part's size that is not the announced one."""
    honest = piece_of(file.data, part)
    return honest[:-1] + bytes([honest[-1] ^ 1])


Attack = Callable[[LargeFile, Json, LargeFile], int]


def _readdressed(change: Callable[[str, LargeFile], str]) -> Attack:
    def attack(file: LargeFile, part: Json, other: LargeFile) -> int:
        return file.send({**part, "url": change(part["url"], other)}, forged(file, part))

    return attack


def _into(url: str, other: LargeFile) -> str:
    """The address as it would be for a part of another upload, with this one's signature."""
    mine, theirs = urlsplit(url), urlsplit(other.parts[0]["url"])
    ids = [parse_qs(each.query)["uploadId"][0] for each in (mine, theirs)]
    return url.replace(mine.path, theirs.path).replace(*ids)


def _method(method: str) -> Attack:
    def attack(file: LargeFile, part: Json, other: LargeFile) -> int:
        body = piece_of(file.data, part)
        return ask_store(method, part["url"], headers=part["headers"], content=body).status_code

    return attack


def _resized(by: int) -> Attack:
    def attack(file: LargeFile, part: Json, other: LargeFile) -> int:
        data = (piece_of(file.data, part) + bytes(max(by, 0)))[: part["size"] + by]
        return file.send(part, data, content_length=str(len(data)))

    return attack


def _expired(file: LargeFile, part: Json, other: LargeFile) -> int:
    settings, data = file.project.core.settings, piece_of(file.data, part)
    key, query = urlsplit(part["url"]).path.split("/", 2)[2], parse_qs(urlsplit(part["url"]).query)
    since = datetime.now(UTC) - timedelta(hours=1)
    url = Signer.of(settings, settings.public_s3_endpoint).sign(
        "PUT",
        key,
        since=since,
        until=since + timedelta(minutes=15),
        headers=pinned(len(data), hashlib.md5(data).hexdigest()),
        query={name: query[name][0] for name in ("partNumber", "uploadId")},
    )
    return file.send({**part, "url": url})


ATTACKS: dict[str, Attack] = {
    "another body": lambda file, part, _: file.send(part, forged(file, part)),
    "longer": _resized(+1),
    "shorter": _resized(-1),
    "another number": _readdressed(lambda url, _: url.replace("partNumber=3", "partNumber=1")),
    "part of another upload": _readdressed(_into),
    "tampered signature": _readdressed(lambda url, _: url[:-1] + ("0" if url[-1] != "0" else "1")),
    "GET": _method("GET"),
    "POST": _method("POST"),
    "DELETE": _method("DELETE"),
    "expired": _expired,
}
