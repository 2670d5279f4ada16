"""The comparison of a run's arms as a document: what each policy did, and which one to use.

Owns the schema ``fedselect-comparison/1``; units are in the names, as in ``reportdoc``. Fields may
be added under the same name of the format, never changed. Must not compute anything.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import Field

from fedselect.lifecycle import RunState
from fedselect.policies import Policy, Reporting
from fedselect.protocol import Answer
from fedselect.reportdoc import Accuracy, Interval, Population

FORMAT = "fedselect-comparison/1"
Mode = Literal["parallel", "randomized"]
Unit = Literal["clients", "examples"]


class ClientInArm(Answer):
    """One client in one arm: its personal model on its own held-out examples."""

    client_id: UUID
    name: str
    arm: str
    accuracy: Accuracy
    participations: int
    sent_bytes: int = Field(description="Update files, as sent.")
    received_bytes: int = Field(
        description="Version and delta files, as received. A file that two arms share is fetched "
        "once, and counts for the arm that came first."
    )
    control_bytes: int = Field(description="Messages and headers, both ways.")


class WorstClient(Answer):
    """The client that does worst in an arm."""

    name: str
    percent: float


class ArmResult(Answer):
    """What one policy did for its clients; null figures are of too few clients, or not known."""

    id: UUID
    name: str
    policy: Policy
    control: bool = Field(description="It is there to compare with, and never recommended.")
    published: int
    version: int | None = Field(description="Number of the version that was evaluated.")
    clients: int = Field(description="n: clients with a score.")
    withheld: int = Field(description="Clients with too few held-out examples to report of.")
    pooled: Accuracy | None = Field(
        description="Of the clients' personal models (`post`), all held-out examples together; the "
        "interval is Wilson's, over these clients' examples."
    )
    pooled_over_clients: Interval | None = Field(
        description="Bootstrap over clients; null below 10 clients."
    )
    pooled_pre: Accuracy | None = Field(
        description="The same of the merged models, before they train on it."
    )
    mean_percent: float | None = Field(description="Every client counts the same.")
    worst: WorstClient | None
    effects: dict[str, Population] = Field(
        description="By baseline: gains, and who is worse or harmed."
    )
    participations: float | None = Field(description="Median over clients.")
    sent_bytes: int
    received_bytes: int
    control_bytes: int
    sent_bytes_each: float | None = Field(description="Update files of a client, mean.")


class Difference(Answer):
    """``arm`` − ``against``, in percentage points."""

    arm: str
    against: str
    paired: bool = Field(description="Both on the same clients; false: on different ones.")
    clients: int = Field(description="n of `arm`; of both, if paired.")
    against_clients: int
    uneven: int = Field(
        description="Of the pairs, clients that trained more often in one of the two arms."
    )
    pooled_points: float = Field(description="All held-out examples together.")
    mean_points: float = Field(description="Every client counts the same.")
    worst_points: float = Field(description="The worst client of one − the worst of the other.")
    over_clients: Interval | None = Field(
        description="95 %, bootstrap over clients, of `pooled_points`; null below 10 clients."
    )
    over_examples: Interval = Field(
        description="95 % of `pooled_points` for these clients alone: Newcombe, for independent "
        "examples, so rather too wide than too narrow where the examples are the same."
    )
    unit: Unit = Field(description="Which of the two decides.")
    level_percent: float = Field(description="95, corrected for the number of pairs of arms.")
    decisive: Interval = Field(description="The interval of that level.")
    verdict: Literal["better", "worse", "undecided"]


class Reason(Answer):
    """One step to the recommendation, in words; the code is stable."""

    code: str
    text: str


class Recommendation(Answer):
    """Which policy this federation should use, and whether the data can tell at all."""

    policy: str | None = Field(description="Name of the arm; null: nothing can be said.")
    leader: str | None = Field(description="The arm that scored highest; by chance, perhaps.")
    tied: list[str] = Field(description="Arms that the data do not tell from the leader.")
    can_tell: bool = Field(description="The leader beats every other arm, in a long run.")
    scope: Literal["population", "these_clients"] = Field(
        description="these_clients: fewer than 10; nothing follows for clients that join."
    )
    short: bool = Field(description="A short trial: such trials have chosen wrongly.")
    reasons: list[Reason]


class ComparedRun(Answer):
    """Which run, and how far it is."""

    id: UUID
    name: str
    model: str
    state: RunState
    mode: Mode
    rounds: int
    seed: int
    budget: str = Field(description="Local work of a participation.")


class Comparison(Answer):
    """The arms of a run, side by side."""

    format: Literal["fedselect-comparison/1"] = "fedselect-comparison/1"
    made_at: datetime
    run: ComparedRun
    suppression: Reporting
    arms: list[ArmResult] = Field(description="In the order of the run's settings.")
    differences: list[Difference] = Field(description="Every pair of arms, once.")
    recommendation: Recommendation
    clients: list[ClientInArm] = Field(description="By name, then in the order of the arms.")

    @property
    def reasons(self) -> list[Reason]:
        """Why the recommendation is what it is."""
        return self.recommendation.reasons
