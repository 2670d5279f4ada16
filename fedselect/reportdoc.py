"""The report of a run as a document: what the run did, for whom, at what cost.

Owns the schema ``fedselect-report/1``, units included: a name that ends in ``percent`` or in
``points`` is on a scale of 100, one in ``bytes`` or ``seconds`` is that. Fields may be added under
the same name of the format, never changed. Must not compute anything.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from fedselect.lifecycle import RunState
from fedselect.policies import Reporting
from fedselect.protocol import Answer

FORMAT = "fedselect-report/1"
Sign = Literal["gain", "loss", "undecided"]


class Interval(Answer):
    """A 95 % interval, in the unit of what it belongs to."""

    low: float
    high: float


class Accuracy(Answer):
    """One model's result on a client's own held-out examples, with a Wilson interval."""

    correct: int
    examples: int = Field(description="n: held-out examples that were scored.")
    percent: float
    interval: Interval


class Gain(Answer):
    """The personalized model against a baseline, on one client: post − baseline."""

    points: float
    interval: Interval
    examples: int = Field(description="n of the personalized model.")
    baseline_examples: int
    paired: bool = Field(
        description="Whether it is known which examples both got right; the interval is then the "
        "one for paired shares, else the wider one for independent shares."
    )
    sign: Sign = Field(description="gain, loss: the whole interval lies above, below 0.")
    worse: bool | None = Field(description="Below −2 points; null: not asked of this baseline.")
    harmed: bool | None = Field(description="The upper bound is below 0; null as for `worse`.")


class ClientCost(Answer):
    """What one client spent, against FedAvg in float32 with as many participations."""

    sent_bytes: int = Field(description="Update files, as sent.")
    received_bytes: int = Field(description="Version and delta files, as received.")
    control_sent_bytes: int
    control_received_bytes: int
    fedavg_sent_bytes: int
    fedavg_received_bytes: int
    seconds: float | None = Field(
        description="From being assigned to a complete upload, all rounds: fetch, train, send."
    )


class ClientReport(Answer):
    """One client: what the models score on its own data, what it gained and what it spent."""

    client_id: UUID
    name: str
    withheld: bool = Field(description="It has fewer held-out examples than are reported of.")
    participations: int
    personal_percent: float = Field(description="Of the elements that could be personal or shared.")
    gated: bool | None = Field(
        None, description="Its gate has turned its mask down; null: no gate has judged."
    )
    accuracy: dict[str, Accuracy]
    gains: dict[str, Gain]
    cost: ClientCost
    divergence: float | None = Field(
        None, description="1 − cosine of its last step and that of all; see `heterogeneity`."
    )
    label_distance: float | None = Field(
        None,
        description="Total variation between its labels and the mean of the other clients that "
        "agreed to tell theirs.",
    )


Index = Literal["divergence", "label_distance"]


class Association(Answer):
    """Whether clients that differ more from the others gain more, or less."""

    index: Index
    baseline: str = Field(description="Of the gain.")
    clients: int = Field(description="n: clients with this index and this gain.")
    mean_index: float
    rank_correlation: float | None = Field(description="Spearman's ρ; null: no spread.")
    interval: Interval | None = Field(description="Bootstrap over clients; null: too few of them.")
    evidence: Literal["sufficient", "insufficient"]


class Population(Answer):
    """The gains of all clients against one baseline; every client counts the same."""

    clients: int = Field(description="n: clients with this gain.")
    mean_points: float
    interval: Interval | None = Field(description="Bootstrap over clients; null: too few of them.")
    evidence: Literal["sufficient", "insufficient"] = Field(
        description="insufficient: fewer than 10 clients, so the mean says nothing of others."
    )
    lowest_points: float
    lower_quartile_points: float
    median_points: float
    upper_quartile_points: float
    highest_points: float
    worst_decile_points: float = Field(description="Mean of the tenth of clients that gain least.")
    worst_decile: list[str]
    gained: list[str] = Field(description="Their whole interval lies above 0.")
    lost: list[str] = Field(description="Their whole interval lies below 0.")
    worse: list[str] | None
    harmed: list[str] | None


class RunPart(Answer):
    """Which run, and how far it is."""

    id: UUID
    name: str
    model: str
    policy: str
    state: RunState
    rounds: int
    published: int
    version: int | None = Field(description="Number of the version that was evaluated.")
    elements: int = Field(description="D: elements of the model.")
    seed: int
    wire: str = Field(description="Encoding of values on the wire.")
    budget: str = Field(description="Local work of a participation.")


class Share(Answer):
    """A share of a count."""

    percent: float
    count: int
    of: int


class RunCost(Answer):
    """What all clients with an evaluation spent, and what the coordinator did."""

    clients: int
    sent_bytes: int
    received_bytes: int
    control_bytes: int
    fedavg_sent_bytes: int
    fedavg_received_bytes: int
    of_fedavg_percent: float | None = Field(description="Files, both ways; control left out.")
    client_seconds: float | None = Field(description="Median over clients, all rounds.")
    client_seconds_known: int = Field(description="n of that median.")
    elapsed_seconds: float | None = Field(description="First round opened to last one published.")
    collecting_seconds: float = Field(description="Waiting for clients, summed over rounds.")
    aggregating_seconds: float = Field(description="Freezing to publishing, summed over rounds.")
    rounds_timed: int = Field(description="n of published rounds in the two sums.")
    rejected: Share = Field(description="Updates that were refused, of all that were delivered.")
    unpublished_rounds: int = Field(description="Rounds that were abandoned, cancelled or failed.")


class ClientMasks(Answer):
    """One client's masks over the rounds that the report looks at; the lists are parallel."""

    client_id: UUID
    name: str
    rounds: list[int]
    personal_percent: list[float]
    jaccard: list[float | None] = Field(
        description="With the mask before it in this list, over what the policy chose; null: "
        "there is none, it was not read, or nothing was chosen in it."
    )


class TensorReport(Answer):
    """How much of one tensor is personal, in each client's last mask."""

    name: str
    role: str
    elements: int
    mean_percent: float
    clients_percent: list[float] = Field(description="In the order of `overlap.clients`.")
    rounds_percent: list[float | None] = Field(
        [],
        description="Mean over the clients whose mask of the round was read, by `masks.rounds`; "
        "null: too few of them.",
    )


class Join(Answer):
    """Two clusters become one. Clients are 0 to n − 1, the first join is n, and so on."""

    one: int
    other: int
    distance: float = Field(description="Mean of 1 − Jaccard over all pairs between the two.")


class Overlap(Answer):
    """How far the clients' last masks agree on what the policy chose: |A ∩ B| / |A ∪ B|."""

    clients: list[str]
    jaccard: list[list[float | None]] = Field(description="null: neither chose anything.")
    mean: float | None = Field(description="Over all pairs of different clients.")
    by_chance: float | None = Field(
        description="That mean if every client had drawn as many elements of each tensor blindly."
    )
    tree: list[Join] = Field(
        [], description="Average linkage of the clients, the closest first; n − 1 joins."
    )


class ClientAgain(Answer):
    """Of what the policy chose for one client, how much another run chose again."""

    client_id: UUID
    name: str
    again_percent: float | None = Field(description="null: nothing was chosen.")
    chance_percent: float | None = Field(
        description="If the other run had chosen as many of each tensor blindly."
    )


class Rerun(Answer):
    """How much of the choice comes again with another seed."""

    run: UUID
    name: str
    seed: int
    clients: list[ClientAgain]
    mean_again_percent: float | None = Field(description="null: too few clients.")
    mean_chance_percent: float | None


class MaskReading(Answer):
    """How much of the stored masks went into this report."""

    wanted: int
    read: int
    missing: int = Field(description="Deleted since, or not the bytes that they were.")
    left_out: int = Field(description="Beyond what one report reads.")
    read_bytes: int
    limit_bytes: int


class MaskReport(Answer):
    """What was personalized."""

    every: int = Field(description="Every so many rounds are looked at, counted from the last.")
    clients_known: int = Field(description="Clients with an update in this run.")
    clients: list[ClientMasks]
    tensors: list[TensorReport]
    tensors_left_out: int
    overlap: Overlap | None = Field(description="null: fewer clients than may be compared.")
    rounds: list[int] = Field([], description="Of `tensors.rounds_percent`.")
    rerun: Rerun | None = Field(None, description="null: none was named.")
    single_clients: bool = Field(
        True,
        description="false: what follows from one client's mask is left out, as who asked has not "
        "the scope `mask:read`: `clients`, the lists by client, the matrix and the tree.",
    )
    reading: MaskReading

    def without_single_clients(self) -> MaskReport:
        """The same without what follows from the mask of one client."""
        tensors = [each.model_copy(update={"clients_percent": []}) for each in self.tensors]
        bare: dict[str, list[Any]] = {"clients": [], "jaccard": [], "tree": []}
        changes = {
            "clients": [],
            "tensors": tensors,
            "overlap": self.overlap and self.overlap.model_copy(update=bare),
            "rerun": self.rerun and self.rerun.model_copy(update={"clients": []}),
            "single_clients": False,
        }
        return self.model_copy(update=changes)


class Fact(Answer):
    """One thing to know before a rollout; what follows from it is for people, or a gate, to say."""

    code: str
    text: str
    value: float | None
    unit: str
    n: int


class RunReport(Answer):
    """A run: who gained, who lost, what it cost, what was personalized, and facts for a rollout."""

    format: Literal["fedselect-report/1"] = "fedselect-report/1"
    made_at: datetime
    run: RunPart
    suppression: Reporting
    clients: list[ClientReport] = Field(description="By name.")
    effects: dict[str, Population] = Field(description="By baseline; none of too few clients.")
    heterogeneity: list[Association] = Field(
        [], description="Gain against heterogeneity; none of too few clients."
    )
    fairness: dict[str, float] = Field(description="Jain's index of the accuracies, by model.")
    unmeasured: dict[str, str] = Field(description="Baselines that the run cannot know, and why.")
    fedavg_run: UUID | None = Field(None, description="The run that `fedavg_ft` was taken from.")
    cost: RunCost
    masks: MaskReport
    facts: list[Fact]
