"""Putting a file in parts together: the step before it is read.

Only the service completes a multipart upload, and only after the client said that all is there.
Doing it again after a crash changes nothing.
"""

from __future__ import annotations

from app import parts
from app.errors import Missing
from app.storage import Storage
from app.tables import Upload
from fedselect.errors import WireError


def assemble(storage: Storage, upload: Upload) -> None:
    """Complete the multipart upload of a staged file; a file in one piece needs nothing.

    Raises:
        WireError: parts are missing (``upload_parts``), or all of them are (``upload_missing``).
        Unavailable: the store does not answer; try again.
    """
    plan = parts.plan_of(upload)
    if plan is None:
        return
    if plan.multipart_id is None:
        raise WireError("complete was called before any part was sent", code="upload_missing")
    try:
        stored = storage.list_parts(plan.key, plan.multipart_id)
    except Missing as error:
        if storage.size(plan.key) == plan.size:  # an earlier attempt got this far
            return
        text = "the store no longer has the parts of this file; send it again"
        raise WireError(text, code="upload_missing") from error
    lacking = plan.lacking(stored)
    if lacking:
        shown = ", ".join(map(str, lacking[:10])) + (", …" if len(lacking) > 10 else "")
        raise WireError(
            f"{len(lacking)} of {len(plan.md5)} parts are not in the store: {shown}",
            code="upload_parts",
        )
    numbers = range(1, len(plan.md5) + 1)
    storage.complete_multipart(plan.key, plan.multipart_id, [(n, stored[n].etag) for n in numbers])
