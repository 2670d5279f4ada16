"""One whole round with the generated client: register, check in, upload, complete, see the outcome.

Arguments: the coordinator's address and an enrolment token. Prints what became of the update. Runs
with the generator's own interpreter: nothing of FedSelect is installed there.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import time
import uuid

import httpx
from coordinator_client import AuthenticatedClient, Client
from coordinator_client.api.administration import list_runs
from coordinator_client.api.agents import (
    check_in,
    complete_upload,
    download_version,
    get_upload,
    register_client,
    reserve_upload,
)
from coordinator_client.models import (
    Assignment,
    CheckIn,
    CheckInAnswer,
    Download,
    Problem,
    Registered,
    Registration,
    RoundState,
    UploadReserve,
    UploadStatus,
    UploadTicket,
)

OPEN = {RoundState.SELECTING, RoundState.COLLECTING, RoundState.AGGREGATING}


def update_file(work: Assignment, values: list[float]) -> bytes:
    """fedselect-update/1 (docs/WIRE.md) of a client that shares everything."""
    count = len(values)
    sections = {
        "block_rank": ("U64", struct.pack("<2Q", 0, count)),
        "values": ("F32", struct.pack(f"<{count}f", *values)),
        "mask": ("U8", bytes(-(-count // 8))),
    }
    header: dict[str, object] = {
        "__metadata__": {
            "assignment": str(work.id),
            "base_version": work.base.sha256,
            "encoding": "f32",
            "examples": "20",
            "format": "fedselect-update/1",
            "mask_version": "1",
            "round": str(work.round_),
            "run": str(work.run.id),
            "space": work.space_digest,
        }
    }
    place = 0
    for name, (dtype, body) in sections.items():
        shape = [len(body) // {"U64": 8, "F32": 4, "U8": 1}[dtype]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(body)]}
        place += len(body)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(body for _, body in sections.values())


def main(server: str, token: str) -> None:
    body = Registration(token=token, name="python", tags=["generated"])
    once = str(uuid.uuid4())
    joined = register_client.sync(client=Client(server), body=body, idempotency_key=once)
    assert isinstance(joined, Registered), joined
    client = AuthenticatedClient(server, token=joined.key)
    answer = check_in.sync(client=client, body=CheckIn())
    assert isinstance(answer, CheckInAnswer), answer
    work = answer.assignment
    assert isinstance(work, Assignment), "there is no work"

    address = download_version.sync(work.base.id, client=client)
    assert isinstance(address, Download), address
    base = httpx.get(address.url).content
    assert hashlib.sha256(base).hexdigest() == address.sha256
    start = 8 + struct.unpack_from("<Q", base)[0]
    values = [value + 1 for (value,) in struct.iter_unpack("<f", base[start:])]

    data = update_file(work, values)
    wanted = UploadReserve(
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        md5=hashlib.md5(data).hexdigest(),
    )
    once = str(uuid.uuid4())
    ticket = reserve_upload.sync(work.id, client=client, body=wanted, idempotency_key=once)
    assert isinstance(ticket, UploadTicket), ticket
    assert isinstance(ticket.url, str)
    headers = ticket.headers.additional_properties
    httpx.put(ticket.url, content=data, headers=headers).raise_for_status()
    status = complete_upload.sync(ticket.id, client=client)
    assert isinstance(status, UploadStatus), status
    while status.state == "uploaded":
        time.sleep(0.2)
        status = get_upload.sync(ticket.id, client=client)
        assert isinstance(status, UploadStatus), status
    while True:
        answer = check_in.sync(client=client, body=CheckIn(pending=work.id))
        assert isinstance(answer, CheckInAnswer), answer
        if answer.pending is None or answer.pending.round_state not in OPEN:
            break
        time.sleep(0.2)
    refused = list_runs.sync(client=client)
    assert isinstance(refused, Problem), refused
    outcome = answer.pending and answer.pending.round_state
    found = {"upload": status.state, "round": outcome, "refused": refused.code}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
