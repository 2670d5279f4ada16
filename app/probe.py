"""What the configured object store enforces, found out by trying.

Owns the trial and its report; the questions are in `app/probe_checks.py`, what the answers mean in
docs/STORAGE.md. Writes only below a random prefix of its own in ``staging/`` and removes that.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import urllib3

from app.errors import Refusal, Unavailable
from app.probe_checks import CHECKS, Check, Lab, Verdict
from app.settings import AppSettings
from app.signing import Signer
from app.storage import S3Storage
from fedselect.errors import FedSelectError

AT_ONCE = 1  # checks at the same time: rclone stumbles over several
PATIENCE = urllib3.Timeout(connect=3, read=10)
START_DELAY = 2.0  # seconds that the coordinator's start waits for the report at most
log = logging.getLogger(__name__)


class StorageNotStrictError(FedSelectError):
    """The object store does not enforce what a strict operator asks for."""

    code = "storage_not_strict"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table: what was tried, what the store did, what that means for us."""

    check: str
    tried: str
    answer: str
    verdict: Verdict
    meaning: str
    essential: bool


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and the seconds that they took."""

    endpoint: str
    findings: list[Finding]
    seconds: float

    @property
    def broken(self) -> list[Finding]:
        """What a strict operator cannot live with."""
        return [f for f in self.findings if f.essential and f.verdict is Verdict.ATTENTION]

    @property
    def summary(self) -> str:
        """The whole in one line."""
        found = [f.verdict for f in self.findings]
        counts = ", ".join(f"{found.count(v)} {v}" for v in Verdict if v in found)
        return f"{len(found)} checks of the object store: {counts}"

    def insist(self) -> None:
        """Be strict.

        Raises:
            StorageNotStrictError: signature, method or expiry are not enforced.
        """
        if self.broken:
            names = "; ".join(f"{f.check}: {f.answer}" for f in self.broken)
            raise StorageNotStrictError(
                f"the object store at {self.endpoint} is not as it must be ({names}). Use "
                "another store, or set STORAGE_STRICT=false if nobody else can reach this one"
            )


def probe(settings: AppSettings, *, public: bool = False) -> Report:
    """Make all checks, at the address the service uses or at the one that clients use.

    Raises:
        Unavailable: the store does not answer at all.
    """
    storage = S3Storage(settings)
    storage.ping()
    endpoint = settings.public_s3_endpoint if public else settings.s3_endpoint
    signer = Signer.of(settings, endpoint)
    root = f"staging/{secrets.token_hex(16)}"
    begun = time.monotonic()
    with urllib3.PoolManager(timeout=PATIENCE, retries=False, maxsize=AT_ONCE) as http:
        labs = [Lab(storage, signer, http, f"{root}-{n:02}") for n in range(len(CHECKS))]
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                findings = list(pool.map(_find, CHECKS, labs))
        finally:
            _clean(storage, root, labs)
    return Report(endpoint, findings, time.monotonic() - begun)


def _find(check: Check, lab: Lab) -> Finding:
    row = partial(Finding, check.name, check.tried, essential=check.essential)
    try:
        good, text = check.make(lab)
    except Refusal as error:
        text = "could not be tried"
        return row(answer=text, verdict=Verdict.ATTENTION, meaning=str(error))
    if good:
        return row(answer=text, verdict=check.good, meaning="")
    return row(answer=text, verdict=check.otherwise, meaning=check.meaning)


def _clean(storage: S3Storage, root: str, labs: list[Lab]) -> None:
    with suppress(Refusal):  # what a store away leaves behind is staging's, and swept with it
        for lab in labs:
            lab.forget()
        storage.delete(list(storage.keys(root)))


# --- at the start of the coordinator -----------------------------------------------------------


def at_start(settings: AppSettings) -> None:
    """Log what the store enforces; a slow store delays the start by two seconds and no more.

    With STORAGE_STRICT the start waits, and ends here if the store is away or not strict.

    Raises:
        StorageNotStrictError, Unavailable: only with STORAGE_STRICT.
    """
    if settings.storage_strict:
        report = probe(settings)
        _log(report)
        report.insist()
        return
    trial = threading.Thread(target=_try_and_log, args=(settings,), daemon=True)
    trial.start()
    trial.join(START_DELAY)


def _try_and_log(settings: AppSettings) -> None:
    try:
        _log(probe(settings))
    except Unavailable as error:
        log.warning("the object store could not be tried: %s", error)


def _log(report: Report) -> None:
    log.info("%s (%.1f s)", report.summary, report.seconds)
    for found in report.findings:
        if found.verdict is Verdict.ATTENTION:
            log.warning("object store, %s: %s; %s", found.check, found.answer, found.meaning)
