"""Profiles: where a coordinator is and which key to use there, by name.

Owns the file ``profiles.toml`` and the rule that a key lies in a file of its own that nobody else
can read. Must not read the environment or connect.

    default = "clinic"

    [profiles.clinic]
    server = "https://fedselect.example"
    key_file = "/home/me/.config/fedselect/clinic.key"
    project = "3f0c…"              # for a key of a whole organisation
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically

EXPOSED = 0o077  # bits of a mode that let others in


@dataclass(frozen=True)
class Profile:
    """One coordinator, and who we are there."""

    server: str
    key_file: str | None = None
    project: str | None = None


@dataclass(frozen=True)
class Profiles:
    """What a file says: profiles by name, and which one counts when none is named."""

    default: str | None = None
    profiles: dict[str, Profile] = field(default_factory=dict)

    def named(self, name: str) -> Profile:
        """The profile of this name.

        Raises:
            FedSelectError: profile_unknown.
        """
        if name not in self.profiles:
            known = ", ".join(sorted(self.profiles)) or "none"
            raise FedSelectError(
                f"there is no profile {name!r}; there are: {known}", code="profile_unknown"
            )
        return self.profiles[name]


def read_profiles(path: Path) -> Profiles:
    """The profiles of a file; none if there is no such file.

    Raises:
        FedSelectError: profile_invalid: the file is not one of ours.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
        return _File.model_validate(found).known()
    except FileNotFoundError:
        return Profiles()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        why = str(error)
    raise FedSelectError(f"{path} cannot be read as profiles: {why}", code="profile_invalid")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")
    server: str
    key_file: str | None = None
    project: str | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    default: str | None = None
    profiles: dict[str, _Table] = {}

    def known(self) -> Profiles:
        return Profiles(self.default, {n: Profile(**vars(t)) for n, t in self.profiles.items()})


def write_profiles(path: Path, profiles: Profiles) -> None:
    """Write the file anew; a comment in the old one is lost."""
    lines = [f"default = {_text(profiles.default)}"] if profiles.default else []
    for name, profile in sorted(profiles.profiles.items()):
        lines += ["", f"[profiles.{_text(name)}]"]
        lines += [f"{key} = {_text(value)}" for key, value in asdict(profile).items() if value]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, ("\n".join(lines).strip() + "\n").encode())


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML one


def read_key(path: Path) -> str:
    """The key in a file.

    Raises:
        FedSelectError: key_missing: not readable; key_exposed: others may read it.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text"
        raise FedSelectError(
            f"cannot read the key file {path} ({why}); give --key-file, a profile or FEDSELECT_KEY",
            code="key_missing",
        ) from error
    if mode & EXPOSED:
        raise FedSelectError(
            f"others may read the key file {path}: chmod 600 it, and rotate the key if they are "
            "not trusted",
            code="key_exposed",
        )
    return text.strip()
