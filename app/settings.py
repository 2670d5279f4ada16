"""Settings of the coordinator and the workers, read from the environment once at start-up.

Owns names, types and defaults of every setting. Must not build anything.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedselect.errors import FedSelectError


class DatabaseSettings(BaseSettings):
    """All that migrations need."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr = Field(description="postgresql+psycopg://user:password@host/name")
    migration_database_url: SecretStr | None = Field(
        None, description="The same for the tables' owner: migrate, backup, restore."
    )

    @property
    def owner_url(self) -> SecretStr:
        """The database for the role that owns the tables, which the service itself is not given."""
        given = self.migration_database_url
        return given if given and given.get_secret_value() else self.database_url


class AppSettings(DatabaseSettings):
    """One field per environment variable (same name in capitals); secrets have no defaults."""

    redis_url: SecretStr = Field(description="redis://:password@host:port/0, the doorbell.")

    s3_endpoint: str = Field(description="Address of the object store as the service reaches it.")
    s3_public_endpoint: str | None = Field(
        None, description="Address as clients reach it; goes into signed URLs. Default: the same."
    )
    s3_region: str = "us-east-1"
    s3_bucket: str = Field(
        "fedselect", min_length=3, max_length=63, pattern=r"^[a-z0-9](\.?[a-z0-9-])*[a-z0-9]$"
    )
    s3_access_key: SecretStr
    s3_secret_key: SecretStr
    s3_timeout: float = Field(
        10,
        gt=0,
        description="Seconds of the store's silence that end a call; it is asked once more, "
        "so keep it below half of LEASE.",
    )
    storage_strict: bool = Field(
        False, description="Refuse to start unless the store enforces signature, method, expiry."
    )

    key_pepper: SecretStr = Field(
        min_length=32, description="Secret for the digests of keys; changing it revokes all keys."
    )
    ledger_key: SecretStr = Field(description="Ed25519 seed, 32 bytes in base64.")
    ledger_key_previous: SecretStr | None = Field(
        None, description="The seed before LEDGER_KEY, while `admin rotate-ledger-key` runs."
    )
    noise_key: SecretStr | None = Field(
        None,
        description="32 bytes in base64 that noise of privacy.dp comes from. Unset: no such runs.",
    )
    ledger_origin: str = Field(
        "fedselect.local/ledger",
        pattern=r"^[^\s+]+$",
        description="The ledger's name, part of its key; never changed once it has entries.",
    )

    encryption_key: SecretStr | None = Field(
        None,
        description="What update files, masks and sums are encrypted with in the store: 32 bytes "
        "in base64. Unset: they are stored in plain.",
    )
    encryption_key_previous: SecretStr | None = Field(
        None,
        description="The key before ENCRYPTION_KEY, until `fedselect storage re-encrypt` has run.",
    )
    encryption_key_file: Path | None = Field(
        None,
        description="Instead of both: a file with one key a line, the current one first.",
    )

    clients_per_organisation: int = Field(
        10_000, ge=0, description="Clients, not revoked, of an organisation that has no own limit."
    )
    oidc_issuer: str | None = Field(
        None,
        description="Identity provider of people: the `iss` of their tokens.",
    )
    oidc_audience: str = Field("fedselect", description="The `aud` that their tokens must have.")
    mtls_header: str | None = Field(
        None,
        description="Header in which the proxy in front, and nobody else, puts the SHA-256 (hex) "
        "of a client certificate that it has checked. Unset: bound keys do not work.",
    )
    url_lifetime: float = Field(900, gt=0, le=3600, description="Seconds a signed URL lives.")
    multipart_keep: float = Field(
        86_400, ge=3600, description="Seconds an unfinished upload in parts may lie in the store."
    )
    upload_bytes_per_day: int = Field(
        64 * 1024**3, gt=0, description="Bytes one client may announce in a day, UTC."
    )
    uploads_per_minute: int = Field(
        120, gt=0, description="Uploads and part addresses one client may ask for in a minute."
    )
    calls_per_second: float = Field(
        50, gt=0, le=1e6, description="Calls of one key in the long run, over all API processes."
    )
    calls_burst: int = Field(200, ge=1, le=1_000_000, description="Calls of one key at once.")
    calls_in_progress: int = Field(
        2, ge=1, le=1000, description="Calls of one key that an API process serves at a time."
    )
    max_body: int = Field(64 * 1024, gt=0, description="Bytes of a JSON body.")
    max_model_body: int = Field(
        4 * 1024**2,
        gt=0,
        description="Bytes of a model's description, and of an estimate's question.",
    )
    report_mask_bytes: int = Field(
        64 * 1024**2, ge=0, description="Bytes of stored masks that one report of a run reads."
    )
    page_limit: int = Field(200, gt=0, le=1000, description="Most items of one page.")
    lease: float = Field(30, gt=0, description="Seconds a worker may hold a job without renewal.")
    job_attempts: int = Field(5, ge=1)
    fold_from: int = Field(
        2**25,
        ge=0,
        description="Values of a round, elements × goal, from which its sum is formed while "
        "updates arrive.",
    )
    watchdog: float = Field(
        30, gt=0, description="Seconds that work may wait until idle workers are restarted."
    )
    recompute_window: float = Field(
        90, ge=0, description="Days a published version stays recomputable; longer if pinned."
    )
    retain_unpublished: float = Field(
        7, ge=0, description="Days the files of a round without a version stay."
    )
    retain_quarantine: float = Field(30, ge=0, description="Days a refused file stays.")
    retain_orphans: float = Field(
        1, ge=0.05, description="Days before what no row names may go; longer than any upload."
    )
    retain_answers: float = Field(7, ge=1, description="Days an Idempotency-Key is remembered.")
    retain_evaluations: float | None = Field(
        None, gt=0, description="Days the evaluations of an ended run stay; unset: for good."
    )
    retain_versions: float | None = Field(
        None, gt=0, description="Days an old version's file stays; unset: for good."
    )
    gc_every: float = Field(900, gt=0, description="Seconds between two collections.")
    gc_batch: int = Field(500, ge=1, le=10_000, description="Objects deleted at a time.")
    idle_transaction: float = Field(
        20, gt=0, description="Seconds a transaction may stand still before its locks are freed."
    )
    database_pool: int = Field(10, ge=1, le=200)
    webhook_private: bool = Field(
        False, description="Let webhooks go to plain HTTP and to addresses of private networks."
    )
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = Field("text", description="text: lines for people.")
    metrics_token: SecretStr | None = Field(
        None, description="Who sends it as Bearer may read /metrics; unset: nobody."
    )
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="Of each process: metrics for all who can reach it."
    )
    metrics_address: str = Field("127.0.0.1", description="Where METRICS_PORT listens.")

    @field_validator("s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _endpoint_is_an_address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if not value and info.field_name == "s3_public_endpoint":
            return None
        if not _is_address(value or "", path=info.field_name == "s3_public_endpoint"):
            raise ValueError("must look like https://host:port, without name and password")
        return value

    @field_validator(
        "encryption_key", "encryption_key_previous", "encryption_key_file", mode="before"
    )
    @classmethod
    def _left_empty_is_unset(cls, value: object) -> object:
        return value or None

    @field_validator("encryption_key", "encryption_key_previous")
    @classmethod
    def _encryption_key_has_its_length(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _key_of(value.get_secret_value())
        return value

    @field_validator("encryption_key_file")
    @classmethod
    def _key_file_holds_keys(cls, value: Path | None) -> Path | None:
        if value is not None and not _keys_in(value):
            raise ValueError("the file holds no key")
        return value

    @model_validator(mode="after")
    def _keys_come_from_one_place(self) -> Self:
        given = self.encryption_key or self.encryption_key_previous
        if given and self.encryption_key_file:
            raise ValueError("give ENCRYPTION_KEY or ENCRYPTION_KEY_FILE, not both")
        if self.encryption_key_previous and not self.encryption_key:
            raise ValueError("ENCRYPTION_KEY_PREVIOUS needs ENCRYPTION_KEY")
        return self

    @field_validator("metrics_token", "metrics_port", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or None

    @field_validator("metrics_token")
    @classmethod
    def _token_cannot_be_guessed(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("at least 16 characters: `openssl rand -hex 32`")
        return value

    @field_validator("ledger_key", "ledger_key_previous", "noise_key")
    @classmethod
    def _ledger_key_is_a_seed(
        cls, value: SecretStr | None, info: ValidationInfo
    ) -> SecretStr | None:
        if value is None or (not value.get_secret_value() and info.field_name != "ledger_key"):
            return None
        _key_of(value.get_secret_value())
        return value

    @cached_property
    def ledger_seed(self) -> bytes:
        """The 32 bytes of the ledger's Ed25519 key."""
        return base64.b64decode(self.ledger_key.get_secret_value())

    @property
    def noise_seed(self) -> bytes | None:
        """The 32 bytes that the noise of all runs comes from, if there are any."""
        given = self.noise_key.get_secret_value() if self.noise_key else ""
        return base64.b64decode(given) if given else None

    @cached_property
    def encryption_keys(self) -> tuple[bytes, ...]:
        """The keys of stored files, the current one first; none if nothing is encrypted."""
        if self.encryption_key_file is not None:
            return _keys_in(self.encryption_key_file)
        given = (self.encryption_key, self.encryption_key_previous)
        return tuple(_key_of(each.get_secret_value()) for each in given if each)

    @cached_property
    def pepper(self) -> bytes:
        """The secret that key digests are made with."""
        return self.key_pepper.get_secret_value().encode()

    @property
    def public_s3_endpoint(self) -> str:
        """Where clients find the object store."""
        return self.s3_public_endpoint or self.s3_endpoint


def _key_of(text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ValueError("it must be 32 bytes in base64: `openssl rand -base64 32`")
    return key


def _keys_in(path: Path) -> tuple[bytes, ...]:
    try:
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error
    return tuple(map(_key_of, lines))


def _is_address(value: str, *, path: bool) -> bool:
    try:
        url = urlsplit(value)
        known = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is none, a bracket that is left open
        return False
    extra = url.username or url.query or url.fragment or (url.path.strip("/") and not path)
    return known and not extra


class SettingsError(FedSelectError):
    """A setting is missing or cannot be used."""

    code = "environment_invalid"


def read(variables: Mapping[str, str] | None = None) -> AppSettings:
    """The settings of this process; ``variables`` win over its environment.

    Raises:
        SettingsError: names every variable that is missing or wrong, but no value.
    """
    given: dict[str, Any] = {name.lower(): value for name, value in (variables or {}).items()}
    try:
        return AppSettings(**given)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        raise SettingsError(
            f"{'; '.join(wrong)}. Settings are environment variables (docs/DEPLOY.md)"
        ) from error
