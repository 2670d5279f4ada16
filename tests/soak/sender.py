"""A client that sends one announced file and says what it took; it may be killed at any moment.

``python -m tests.soak.sender SERVER ASSIGNMENT FILE``, the key in ``FEDSELECT_KEY``. Writes one
JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from uuid import UUID

from fedselect.client import Client, Source, announce


def main(server: str, assignment: str, name: str) -> None:
    """Announce, send, complete: what an agent does with a file that is on its disk."""
    path = Path(name)
    with path.open("rb") as file:

        def read(start: int, length: int) -> bytes:
            file.seek(start)
            return file.read(length)

        source = Source(path.stat().st_size, read)
        with Client(server, key=os.environ["FEDSELECT_KEY"]) as client:
            ticket = client.reserve_update(UUID(assignment), announce(source))
            client.put_file(ticket, source)
            client.complete(ticket.id)
    # Not getrusage: its peak is that of the process that started this one, if that was larger.
    status = Path("/proc/self/status").read_text()
    memory = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    json.dump({"upload": str(ticket.id), "memory": memory}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
