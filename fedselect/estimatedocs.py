"""The documents of estimates: what is asked, what a run would cost, and what it did cost.

Owns their shape and limits, for the coordinator, the SDK and the command line alike. Bytes are
whole numbers, times seconds, shares from 0 to 1. How they come about is ``estimate``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import Field, StringConstraints, model_validator

from fedselect.deltas import Encoding
from fedselect.policies import RunSettings
from fedselect.protocol import Answer, PrivacyAccount, Request
from fedselect.scalars import Count, Real, Whole
from fedselect.space import MAX_ELEMENTS

MOST_STRETCHES = 64
LinkText = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9./]*$", min_length=1, max_length=40)
]


class Measured(Request):
    """What a dry run has measured at a site; what is missing is assumed."""

    step_seconds: Real | None = Field(None, gt=0, le=1e6, description="Of one gradient step.")
    value_bytes_up: Real | None = Field(
        None, gt=0, le=8, description="Per shared element of an update of coded deltas."
    )
    value_bytes_down: Real | None = Field(
        None, gt=0, le=8, description="Per element of a version's delta file."
    )
    accuracy_cost: Real | None = Field(
        None, ge=-100, le=100, description="Points that the noise of `privacy.dp` alone cost."
    )


class EstimateCreate(Request):
    """What a run would cost: exactly one of ``model_id``, ``space`` and ``elements``."""

    model_id: UUID | None = Field(None, description="A registered model.")
    space: dict[str, Any] | None = Field(None, description="A parameter space that is not (yet).")
    elements: Whole | None = Field(
        None,
        ge=1,
        le=MAX_ELEMENTS,
        description="As one tensor of so many elements that may turn personal.",
        examples=[11_200_000],
    )
    settings: RunSettings = RunSettings()
    clients: Whole = Field(ge=1, le=1_000_000, description="Of the federation.", examples=[200])
    links: list[LinkText] = Field(
        ["10mbit"],
        min_length=1,
        max_length=8,
        description="Down and up, as `10mbit`, `50mbit/10mbit`, or a class: docs/ESTIMATES.md.",
    )
    store_link: LinkText = Field("1gbit", description="Of the object store, shared by all clients.")
    examples: Whole = Field(1000, ge=1, le=10**12, description="Of a client's training data.")
    data_bytes: Count | None = Field(
        None, description="Of a client's data, to compare with sending them to one place."
    )
    workers: Whole = Field(2, ge=1, le=1000, description="Worker processes of the coordinator.")
    measured: Measured = Measured()

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        given = (self.model_id, self.space, self.elements)
        if sum(each is not None for each in given) != 1:
            raise ValueError("give exactly one of model_id, space and elements")
        return self


# --- the answer --------------------------------------------------------------------------------


class Traffic(Answer):
    """Bytes seen from the clients: files, and in columns of their own what else HTTP carries."""

    up: int = Field(description="Update files.")
    down: int = Field(description="Version and delta files.")
    control_up: int = Field(description="Headers of all calls and the JSON of requests.")
    control_down: int = Field(description="Headers and the JSON of answers.")


class Stretch(Answer):
    """Participations of a client, counted from 1, whose files are alike."""

    first: int
    last: int
    personal_share: float = Field(description="Of all elements, those that never travel included.")
    mask: Literal["first", "grown", "unchanged"]
    mask_bytes: int = Field(description="Of the mask inside the update; 0 if it is left out.")
    update_bytes: int
    download_bytes: int


class EncodingBytes(Answer):
    """Bytes of one client in a whole run in this encoding."""

    encoding: Encoding
    up: int
    down: int
    of_fedavg: float = Field(description="Both ways, of FedAvg in float32.")


class LinkTime(Answer):
    """Seconds on one link."""

    name: str
    down_bits: float = Field(description="Bits a second.")
    up_bits: float
    round_trip: float = Field(description="Seconds from a request to its answer, at least.")
    down_seconds: float = Field(description="Of one participation.")
    up_seconds: float
    round_seconds: float = Field(description="From the opening of a round to its version.")
    run_seconds: float


class ComputeTime(Answer):
    """A client's own work in one participation."""

    steps: int
    seconds: float
    basis: Literal["measured", "flops"] = Field(
        description="measured: by a dry run; flops: 6 × elements × batch size for a step, which is "
        "right for dense layers and too little for convolutions."
    )


class ServerWork(Answer):
    """What a round costs the coordinator, in seconds and bytes."""

    verify_seconds: float = Field(description="Processor time of verifying all updates.")
    kernel_seconds: float = Field(description="The sums alone.")
    publish_seconds: float = Field(description="From the last accepted update to the version.")
    worker_memory: int = Field(description="Peak of a worker process, whatever the model.")


class Storage(Answer):
    """Bytes in the object store."""

    per_round: int = Field(description="Accepted updates, masks, version and delta.")
    run: int = Field(description="At the end of the run.")
    kept: int = Field(description="Once `recompute_window` has released updates and masks.")


class Against(Answer):
    """The whole run, both ways, all clients, against two other ways."""

    fedavg: int = Field(description="FedAvg in float32: 4 bytes per element each way.")
    of_fedavg: float
    central: int | None = Field(description="Sending everybody's data to one place, once.")
    of_central: float | None


class ArmEstimate(Answer):
    """What one arm of a run would cost, as if it were alone."""

    name: str
    clients: int = Field(description="That do this arm.")
    masks: list[Stretch]
    client: Traffic
    run: Traffic
    of_fedavg: float


class Estimate(Answer):
    """What a run would cost; of a run with arms the sums over them, ``masks`` are the first's."""

    format: Literal["fedselect-estimate/1"] = "fedselect-estimate/1"
    elements: int
    clients: int
    per_round: int = Field(description="Clients that take part in a round.")
    participations: float = Field(description="Of one client, on average.")
    encoding: Encoding
    masks: list[Stretch] = Field(description=f"The mask schedule, at most {MOST_STRETCHES} rows.")
    participation: Traffic = Field(description="Of one participation, on average.")
    round: Traffic = Field(description="Of one round, all clients.")
    client: Traffic = Field(description="Of one client in the whole run, its evaluation included.")
    run: Traffic = Field(description="Of the whole run, all clients.")
    evaluation_down: int = Field(description="Of what a client receives, that for its evaluation.")
    encodings: list[EncodingBytes]
    links: list[LinkTime]
    compute: ComputeTime
    server: ServerWork
    storage: Storage
    against: Against
    privacy: PrivacyAccount | None = Field(None, description="Of a run with differential privacy.")
    assumptions: list[str] = Field(description="What was not known, in words.")
    arms: list[ArmEstimate] = Field([], description="Each of a run of several.")


# --- afterwards --------------------------------------------------------------------------------


class Spent(Answer):
    """What a run has cost up to now, as the coordinator has counted it."""

    rounds: int = Field(description="Published.")
    clients: int = Field(description="That have taken part.")
    reports: int = Field(description="Evaluations, which tell what clients have counted.")
    up: int = Field(description="Update files that were completed.")
    down: int = Field(description="Version and delta files that clients were told to fetch.")
    control_up: int | None = Field(description="From the evaluations, once all are in.")
    control_down: int | None
    round_seconds: float | None = Field(description="Median, from opening to closing.")


class Errors(Answer):
    """(estimate − actual) / actual; null where there is nothing to compare."""

    up: float | None
    down: float | None
    payload: float | None = Field(description="Both ways, files alone.")
    control: float | None = Field(description="For as long as the rounds took.")
    round_seconds: float | None = Field(description="On the first link that was named.")


class RunEstimate(Answer):
    """A run's estimate beside what it has cost, for as many rounds and clients as there were."""

    format: Literal["fedselect-run-estimate/1"] = "fedselect-run-estimate/1"
    run_id: UUID
    estimate: Estimate
    actual: Spent
    errors: Errors
