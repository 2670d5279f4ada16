"""The run file of a pilot: its form, what is wrong with one, and one with comments.

Owns the form ``fedselect-pilot/1`` (docs/PILOT.md; docs/pilot.schema.json) and what a file asks of
the service. YAML itself is ``yamlfile``. Must not open files or connect.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from fedselect.cohortdocs import CohortRule
from fedselect.deltas import Encoding
from fedselect.errors import FedSelectError, SettingsError
from fedselect.estimatedocs import LinkText
from fedselect.links import link
from fedselect.policies import (
    PRESETS,
    Arms,
    RoundPolicy,
    RunSettings,
    Settings,
    Training,
    Wire,
    preset,
    preset_run,
)
from fedselect.protocol import Name
from fedselect.rolloutdocs import Gates, Percent, RolloutCreate
from fedselect.scalars import Flag, Real, Whole
from fedselect.yamlfile import Document, MisspeltError, Path, read

FORMAT = "fedselect-pilot/1"
SCHEMA = "https://json-schema.org/draft/2020-12/schema"
MOST_SAID = 5  # mistakes of one file that are told at once


def _plainly(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


class Rollout(Settings):
    """How a version that did well gets to everybody, and what must hold on the way."""

    stages: list[Percent] = Field(
        [5, 25, 100], min_length=1, max_length=20, description="Percent of all clients, rising."
    )
    minimum: Whole = Field(3, ge=1, description="Clients that a stage and the control group have.")
    control: Real = Field(
        10, gt=0, le=50, description="Percent of all clients that stay on the old version."
    )
    gates: Gates = Field(Gates(), description="What a stage must keep; null switches one off.")
    automatic: Flag = Field(False, description="A stage that passes leads to the next by itself.")
    roll_back_on_harm: Flag = Field(
        False, description="If harmed_share fails, roll back at once instead of holding."
    )
    stage_seconds: Whole = Field(
        3600, ge=1, le=90 * 86_400, description="How long a stage waits for evaluations."
    )

    @model_validator(mode="after")
    def _can_be_asked_for(self) -> Self:
        try:
            self.request("x", UUID(int=0), UUID(int=0), "x")
        except ValidationError as error:
            raise ValueError("; ".join(_plainly(each["msg"]) for each in error.errors())) from error
        return self

    def request(self, name: str, model_id: UUID, version_id: UUID, reason: str) -> RolloutCreate:
        """What is asked of the service, to bring this version of this model to everybody."""
        asked = {each: getattr(self, each) for each in type(self).model_fields}
        return RolloutCreate(
            name=name, model_id=model_id, version_id=version_id, reason=reason, **asked
        )


def _known_policies(names: list[str]) -> list[str]:
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"there is no policy {name!r}; there are {', '.join(PRESETS)}")
    if len(set(names)) < len(names):
        raise ValueError("a policy is named twice; keep one")
    return names


def _known_link(text: str) -> str:
    try:
        link(text)
    except SettingsError as error:
        raise ValueError(str(error)) from error
    return text


class PilotFile(Settings):
    """A pilot: who tries what for how long, and what must hold before others get it."""

    format: Literal["fedselect-pilot/1"] = Field(description="The form of this file.")
    name: Name = Field(description="Of the pilot; its cohort, run and rollout are called so, too.")
    profile: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = (
        Field(None, description="Of profiles.toml: which coordinator, with which key.")
    )
    project: UUID | None = Field(None, description="For a key of a whole organisation.")
    model: Name = Field(description="A registered model, by name.")
    cohort: CohortRule = Field(description="Which clients take part.")
    policies: Annotated[list[str], AfterValidator(_known_policies)] = Field(
        ["fedselect"], min_length=1, max_length=10, description="Presets; several are compared."
    )
    compare: Literal["parallel", "randomized"] = Field(
        "parallel",
        description="parallel: every client runs every policy; randomized: clients are split.",
    )
    rounds: Whole = Field(30, ge=1, le=100_000, description="Of every policy.")
    seed: Whole = Field(0, ge=0, lt=2**63, description="Of batches and of chance.")
    training: Training = Training(steps=20)
    round: RoundPolicy = RoundPolicy()
    encoding: Encoding = Field("f32", description="How values travel: f32, bf16 or int8.")
    link: Annotated[LinkText, AfterValidator(_known_link)] = Field(
        "10mbit", description="The clients' line, for the estimate alone."
    )
    rollout: Rollout = Field(Rollout(), description="How it gets to everybody afterwards.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            self.settings()
        except ValidationError as error:
            raise ValueError("; ".join(_plainly(each["msg"]) for each in error.errors())) from error
        return self

    def settings(self) -> RunSettings:
        """Settings of the run; with several policies each is an arm.

        Raises:
            ValidationError: settings that contradict each other.
        """
        changes = {name: getattr(self, name) for name in ("seed", "training", "round")}
        changes["wire"] = Wire(encoding=self.encoding)
        if len(self.policies) > 1:
            every = tuple(preset(name, rounds=self.rounds) for name in self.policies)
            changes["arms"] = Arms(mode=self.compare, policies=every)
        return preset_run(self.policies[0], rounds=self.rounds, **changes)


# --- reading -----------------------------------------------------------------------------------


def parse(text: str, name: str) -> PilotFile:
    """The pilot that a text describes; ``name`` is that of its file.

    Raises:
        FedSelectError: pilot_file_invalid; it names lines, values and what to do.
    """
    try:
        found = read(text)
    except MisspeltError as error:
        raise _invalid(name, [f"line {error.line}: {error.problem}"]) from error
    try:
        return PilotFile.model_validate(found.data)
    except ValidationError as error:
        said = [_say(each, found) for each in error.errors(include_url=False)]
        raise _invalid(name, said) from error


def _invalid(name: str, said: list[str]) -> FedSelectError:
    more = f"; and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else ""
    return FedSelectError(f"{name}: {'; '.join(said[:MOST_SAID])}{more}", code="pilot_file_invalid")


def _say(error: Any, found: Document) -> str:
    """One mistake: where it stands, what is there, what to do."""
    path: Path = error["loc"]
    place = ".".join(map(str, path)) or "the file"
    line = f"line {found.line(path)}: "
    around, field = _form(path)
    if error["type"] == "missing":
        return f"{line}{place} is missing: {field or 'add it'}"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(path[-1]), around, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(around)}"
        return f"{line}{place} is no setting; {hint}"
    message = _plainly(error["msg"])
    if isinstance(error["input"], dict | list | BaseModel):
        return f"{line}{place}: {message}"
    hint = f" ({field.rstrip('.')})" if field else ""
    return f"{line}{place} is {_flow(error['input'])}: {message}{hint}"


def _form(path: Path) -> tuple[list[str], str | None]:
    """The names that the mapping around a path may hold, and what the value is for."""
    form: type[BaseModel] = PilotFile
    said = None
    for depth, part in enumerate(path, start=1):
        field = form.model_fields.get(str(part))
        if field is None:
            break
        said, inner = field.description, field.annotation
        if depth < len(path) and isinstance(inner, type) and issubclass(inner, BaseModel):
            form = inner
    return list(form.model_fields), said


# --- writing -----------------------------------------------------------------------------------

_HEAD = """\
# A pilot: a few sites try it, before anybody else does. docs/PILOT.md tells how.
#   fedselect pilot start FILE      begin, or go on; the same file twice is the same pilot
#   fedselect pilot watch FILE      look on
#   fedselect pilot report FILE     who gained, who lost, what it cost, what the gates say
#   fedselect pilot promote FILE    on to the next stage     (rollback: everybody back)
# Once it has started, this file does not change it; another pilot has another name."""
_WHY = {
    "name": "Of the cohort, the run and the rollout.",
    "profile": "Which coordinator, with which key: fedselect admin profiles list.",
    "project": "For a key of a whole organisation.",
    "model": "What is trained: fedselect admin models list.",
    "cohort": "Who takes part: clients: [NAMES], tag: TAG, or percent: OF_ALL_CLIENTS.",
    "policies": "What is tried; with several, the report says which one this federation should "
    "use.",
    "compare": "parallel: every client runs every policy; randomized: clients are split.",
    "rounds": "Below 30 a comparison is not said to tell: short trials have chosen wrongly.",
    "seed": "Of batches and of chance.",
    "training": "What a client does in a round: steps or epochs, and how.",
    "round": "Clients are asked until `goal` have sent; `quorum` are enough at the deadline "
    "(seconds).",
    "encoding": "How values travel: f32, bf16 or int8 (docs/WIRE.md).",
    "link": "The clients' line, for the estimate alone: 10mbit, 50mbit/10mbit, dsl, 4g …",
    "rollout": "Afterwards, stage by stage (percent of all clients), and what each stage must keep "
    "(docs/ROLLOUT.md).",
}
_SHOWN = {  # of parts, what is written although nobody changed it
    "training": ("batch_size", "learning_rate"),
    "round": ("goal", "quorum", "min_contributors", "report_deadline", "retry_after"),
    "rollout": ("stages", "minimum", "control", "gates", "stage_seconds"),
    "gates": ("baseline", "mean_gain", "harmed_share", "worst_decile_drop", "rejection_rate"),
}
_BARE = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[A-Za-z][A-Za-z0-9._/-]*", re.I)


def write(file: PilotFile, *, notes: Sequence[str] = ()) -> str:
    """The file with comments, read back as the same; ``notes`` become comments at its head."""
    lines = [*_HEAD.splitlines(), *(["#"] if notes else []), *(f"# {note}" for note in notes)]
    lines += ["", f"format: {FORMAT}"]
    for name in _WHY:
        value = getattr(file, name)
        plain = name == "compare" and value == "parallel" and len(file.policies) == 1
        if value is None or plain:
            continue
        lines += ["", f"# {_WHY[name]}", *_entry(name, value)]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, indent: str = "") -> Iterator[str]:
    if not isinstance(value, BaseModel):
        yield f"{indent}{name}: {_flow(value)}"
        return
    yield f"{indent}{name}:"
    changed = value.model_fields_set & value.model_dump(exclude_defaults=True).keys()
    for each in type(value).model_fields:
        if each in changed or each in _SHOWN.get(name, ()):
            yield from _entry(each, getattr(value, each), f"{indent}  ")


def _flow(value: Any) -> str:
    """A value on one line of YAML: JSON, with quotation marks where a text needs them."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    text = str(value) if isinstance(value, UUID) else value
    bare = isinstance(text, str) and _BARE.fullmatch(text)
    return text if bare else json.dumps(text, ensure_ascii=False)


def schema() -> str:
    """The form as a JSON schema, for editors; docs/pilot.schema.json is this text."""
    found = {"$schema": SCHEMA, **PilotFile.model_json_schema()}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
