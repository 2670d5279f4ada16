"""Run settings and presets: a policy with its training, its rounds, its limits and its wire.

Owns the settings of a whole run with their checks, and the named policies. One policy is
``policy``. Must not compute scores (``scores``), choose (``selection``) or train (``training``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedselect.deltas import Encoding
from fedselect.disclosure import Disclosure
from fedselect.errors import SettingsError
from fedselect.influence import Influence
from fedselect.policy import Policy, Settings, later
from fedselect.privacy import Dp, Privacy, Secure, contradiction, exposed
from fedselect.scalars import Real, Whole

__all__ = [
    "ARM_CLIENTS",
    "LATE",
    "MOST_ARMS",
    "PARALLEL_BELOW",
    "PRESETS",
    "Arms",
    "Disclosure",
    "Dp",
    "Influence",
    "Limits",
    "Policy",
    "Privacy",
    "Reporting",
    "RoundPolicy",
    "RunSettings",
    "Secure",
    "Settings",
    "Training",
    "Wire",
    "later",
    "preset",
    "preset_run",
]


class Training(Settings):
    """The local budget of one assignment: plain SGD, ``steps`` or ``epochs`` (exactly one)."""

    steps: Whole | None = Field(None, ge=1, le=1_000_000, examples=[20])
    epochs: Whole | None = Field(None, ge=1, le=10_000)
    batch_size: Whole = Field(20, ge=1, le=65_536)
    learning_rate: Real = Field(0.05, gt=0, le=100)
    clip_norm: Real | None = Field(None, gt=0, description="L2 bound on the whole gradient.")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.steps and training.epochs")
        return self


class RoundPolicy(Settings):
    """How a round is run. Times in seconds; ``goal`` and ``quorum`` count clients."""

    goal: Whole = Field(10, ge=1, le=100_000)
    over_selection: Real = Field(1.3, ge=1, le=10)
    quorum: Whole = Field(2, ge=1, le=100_000)
    selection_deadline: Real = Field(600, gt=0, le=7 * 86_400)
    report_deadline: Real = Field(3600, gt=0, le=30 * 86_400)
    verification_timeout: Real = Field(600, gt=0, le=86_400)
    min_contributors: Whole = Field(
        2, ge=1, le=1000, description="k: fewer sharers freeze an element"
    )
    weighting: Literal["uniform", "examples"] = "uniform"
    late: Literal["reject"] = "reject"
    client_attempts: Whole = Field(
        2, ge=1, le=10, description="Tries of one client in a round, should its update be rejected."
    )
    max_attempts: Whole = Field(
        5, ge=1, le=100, description="Tries of a round before the run pauses."
    )
    retry_after: Real = Field(30, gt=0, le=86_400, description="Mean of the check-in window.")

    @model_validator(mode="after")
    def _quorum_fits(self) -> Self:
        if self.quorum > self.goal:
            raise ValueError(f"quorum {self.quorum} is above goal {self.goal}")
        if self.min_contributors > self.goal:
            raise ValueError(
                f"min_contributors {self.min_contributors} is above goal {self.goal}: "
                "every element would stay frozen"
            )
        return self

    @property
    def places(self) -> int:
        """How many clients a round assigns: the goal with its over-selection, rounded up."""
        return math.ceil(round(self.goal * self.over_selection, 6))


class Limits(Settings):
    """What one update may hold, against updates that would drown all others.

    The defaults are far beyond the weights of any network that learns (their magnitudes stay below
    1,000, their norm below √D times that); raise them if a task shares raw statistics, such as
    running variances of inputs that were not normalized. Where deltas travel, they are what counts.
    """

    max_abs: Real = Field(1e6, gt=0, description="Largest magnitude of a value that is sent.")
    max_norm: Real = Field(1e7, gt=0, description="Largest L2 norm of all values that are sent.")


class Wire(Settings):
    """How values travel (docs/WIRE.md).

    ``f32``: the trained values as they are. ``bf16`` and ``int8``: deltas against the version that
    training started from, rounded, entropy-coded and with error feedback; the published version
    is then the base and a rounded mean delta.
    """

    encoding: Encoding = "f32"


class Reporting(Settings):
    """Which numbers a report may show: small groups say too much of those in them.

    Fixed with the run, so that nobody who reads a report can lower them.
    """

    min_examples: Whole = Field(
        10,
        ge=1,
        le=1_000_000,
        description="Held-out examples without which a client's scores stay where they are.",
    )
    min_clients: Whole = Field(
        3, ge=1, le=100_000, description="Clients without which no figure is formed over them."
    )


MOST_ARMS = 16
ARM_CLIENTS = 20  # that a randomized arm has at least
PARALLEL_BELOW = 50  # clients, unless a mode is given


class Arms(Settings):
    """Several policies in one run, each with a line of versions of its own, to be compared.

    ``parallel``: every client does every arm, with a state for each, so that differences are within
    clients. ``randomized``: every client does one arm, by a stable hash, at least 20 an arm.
    """

    mode: Literal["parallel", "randomized"] | None = Field(
        None,
        description="Null: chosen when the run is created; parallel below 50 active clients, or "
        "if an arm would have fewer than 20.",
    )
    policies: tuple[Policy, ...] = Field(min_length=1, max_length=MOST_ARMS)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"arms need names that differ, not {', '.join(names)}")
        return self

    def settled(self, clients: int) -> Arms:
        """The same with a mode, for so many clients."""
        if self.mode is not None:
            return self
        few = clients < max(PARALLEL_BELOW, ARM_CLIENTS * len(self.policies))
        return self.model_copy(update={"mode": "parallel" if few else "randomized"})

    def of_client(self, client: str, *, seed: int) -> tuple[Policy, ...]:
        """The arms that a client does; equal ids and seeds are always split alike."""
        if self.mode != "randomized":
            return self.policies
        digest = hashlib.sha256(f"fedselect-arms/{seed}/{client}".encode()).digest()
        return (self.policies[int.from_bytes(digest[:8], "big") % len(self.policies)],)

    def check_split(self, clients: Mapping[str, int]) -> None:
        """Refuse a randomized split into such groups, by name of the arm, if one is too small.

        Raises:
            SettingsError: ``arm_too_small``.
        """
        sizes = {policy.name: clients.get(policy.name, 0) for policy in self.policies}
        if self.mode != "randomized" or min(sizes.values()) >= ARM_CLIENTS:
            return
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise SettingsError(
            f"randomized arms need at least {ARM_CLIENTS} clients each, but the split is {shown}; "
            "enrol more clients, name fewer arms, or run the arms in mode parallel",
            code="arm_too_small",
        )


class RunSettings(Settings):
    """Everything that decides a run's result, besides its data and its starting weights.

    In a run with ``arms``, ``policy`` is that of the first one.
    """

    rounds: Whole = Field(60, ge=1, le=100_000)
    seed: Whole = Field(0, ge=0, lt=2**63)
    policy: Policy = Policy()
    training: Training = Training(steps=20)
    round: RoundPolicy = RoundPolicy()
    limits: Limits = Limits()
    wire: Wire = Wire()
    report: Reporting = Reporting()
    arms: Arms | None = later(None)
    privacy: Privacy = later(Privacy())
    disclosure: Disclosure = later(Disclosure())
    influence: Influence | None = later(None)

    @model_validator(mode="after")
    def _policy_is_the_first_arms(self) -> Self:
        if self.arms is not None:
            first = self.arms.policies[0]
            if self.policy not in (Policy(), first):
                raise ValueError("give policy or arms, not both")
            self.__dict__["policy"] = first  # it is frozen for everybody else
        return self

    @model_validator(mode="after")
    def _rounded_counts_are_enough(self) -> Self:
        step, least = self.disclosure.round_counts, self.report.min_examples
        if least % step:
            raise ValueError(
                f"disclosure.round_counts {step} does not divide report.min_examples {least}: what "
                "is just enough to be told would be rounded to too few"
            )
        return self

    @model_validator(mode="after")
    def _both_models_train(self) -> Self:
        two = any(policy.proximal is not None for policy in self.policies)
        if two and self.training.steps == 1:
            raise ValueError("two models share the steps: give training.steps of at least 2")
        return self

    @model_validator(mode="after")
    def _mask_is_used(self) -> Self:
        for policy in self.policies:
            first = policy.first_use()
            if first is not None and self.rounds <= first:
                raise ValueError(
                    f"no mask of {policy.name} would ever be used: the first one serves "
                    f"participation {first + 1}, but the run has {self.rounds} rounds; raise "
                    "rounds, or lower policy.start_round or policy.interval"
                )
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> Self:
        fault = contradiction(self)
        if fault is not None:
            raise ValueError(fault)
        return self

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Those of all arms; one in a run that does not speak of arms."""
        return (self.policy,) if self.arms is None else self.arms.policies

    @property
    def told(self) -> Reporting:
        """The rules of reports as they count: no figure over clients is of fewer than k of them."""
        least = max(self.report.min_clients, self.round.min_contributors)
        return self.report.model_copy(update={"min_clients": least})

    @property
    def parallel(self) -> int:
        """How many arms a client does."""
        return len(self.policies) if self.arms and self.arms.mode != "randomized" else 1

    def of_arm(self, name: str) -> RunSettings:
        """The settings of one arm: its policy, and nothing of other arms.

        Raises:
            SettingsError: ``arm_unknown``.
        """
        if self.arms is None:
            return self
        for policy in self.arms.policies:
            if policy.name == name:
                return self.model_copy(update={"policy": policy, "arms": None})
        known = ", ".join(policy.name for policy in self.arms.policies)
        raise SettingsError(f"there is no arm {name!r}; there are {known}", code="arm_unknown")

    def arms_of(self, client: str) -> tuple[str, ...]:
        """Names of the arms that a client (by its id) does."""
        if self.arms is None:
            return (self.policy.name,)
        return tuple(each.name for each in self.arms.of_client(client, seed=self.seed))

    def warnings(self, clients: int | None = None) -> list[str]:
        """Settings that are allowed but rarely meant; ``clients`` may take part, if it is known."""
        found = exposed(self)
        if self.round.goal < 2 * self.round.min_contributors:
            found.append(
                f"goal {self.round.goal} is below 2 × min_contributors "
                f"{self.round.min_contributors}: many elements will stay frozen"
            )
        found += [
            f"policy {policy.name} chooses its mask after the first participation, when score "
            f"{policy.score} knows nothing yet: nothing turns, or with direction release what "
            "comes first in the model; give start_round 2 or more"
            for policy in self.policies
            if policy.uninformed
        ]
        if self.privacy.dp is not None:
            found.append(
                "with privacy.dp every element that may travel moves by a noised sum over the "
                "goal: min_contributors does not apply, and where few share it moves less"
            )
            if clients and self.privacy.dp.delta * clients > 1:
                found.append(
                    f"δ {self.privacy.dp.delta:g} is above 1 / {clients} clients: it allows to "
                    "publish one of them whole; give privacy.dp.delta a tenth of that, or less"
                )
        if clients:
            found += self._unreached(clients * self.parallel / len(self.policies))
        return found

    def _unreached(self, clients: float) -> list[str]:
        """Of arms with so many clients each: whose masks start later than most of them get."""
        places = self.round.places
        takes = self.rounds * min(1.0, places / clients)
        firsts = {policy.name: policy.first_use() for policy in self.policies}
        return [
            f"with {clients:.0f} clients for {places} places a round, each takes part about "
            f"{takes:.1f} times, but a mask of {name} first serves participation {first + 1}: most "
            "clients never use one; raise rounds or goal, or lower policy.start_round"
            for name, first in firsts.items()
            if first is not None and takes <= first
        ]


_FISHER = {"score": "fisher", "scope": "global", "elements": "all", "fraction": 0.02}
PRESETS: dict[str, dict[str, Any]] = {
    "fedselect": {"personal": "learned"},
    "fedselect-official": {
        "personal": "learned",
        "growth": 0.25,
        "limit": 0.8,
        "limit_mode": "official",
        "interval": 3,
        "schedule": "alternating",
    },
    "fisher": {**_FISHER},
    "fisher-gate": {**_FISHER, "gate": "holdout"},
    "shuffled": {**_FISHER, "shuffled": True},
    "random": {"personal": "learned", "score": "random"},
    "fedavg": {"personal": "none"},
    "local": {"personal": "all"},
    "fedavg-ft": {"personal": "none", "finetune": True},
    "fedper": {"personal": "head"},
    "fedper-late": {"personal": "head"},
    "fedrep": {"personal": "head", "schedule": "alternating"},
    "fedbabu": {"personal": "head", "trains": "body", "finetune": True},
    "lg-fedavg": {"personal": "body"},
    "fedbn": {"personal": "norm"},
    "ditto": {"personal": "none", "proximal": 0.1},
    "share-then-local": {"personal": "all"},
}
LATE = frozenset(  # they share first
    {"fedselect", "fisher", "fisher-gate", "shuffled", "random", "fedper-late", "share-then-local"}
)


def preset(name: str, /, *, rounds: int | None = None, **changes: Any) -> Policy:
    """A named policy, with single settings changed; another ``name``, too.

    In a run of so many ``rounds``, those of ``LATE`` share first and personalize from the middle
    on; without them they do not wait.

    Raises:
        SettingsError: no such preset.
    """
    if name not in PRESETS:
        raise SettingsError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    start = {"start_round": rounds // 2} if rounds is not None and name in LATE else {}
    return Policy(**{"name": name, **PRESETS[name], **start, **changes})


def preset_run(name: str, *, rounds: int, **changes: Any) -> RunSettings:
    """Run settings of a preset; ``fedselect-official`` keeps the authors' budget and a contributor
    threshold of 1.

    Raises:
        SettingsError: no such preset.
    """
    settings: dict[str, Any] = {"rounds": rounds, "policy": preset(name, rounds=rounds)}
    if name == "fedselect-official":
        settings["training"] = Training(epochs=15, batch_size=32, learning_rate=0.05)
        settings["round"] = RoundPolicy(min_contributors=1)
    return RunSettings(**{**settings, **changes})
