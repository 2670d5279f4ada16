"""The calls of administrators about access (who they are, projects, keys, members), about
versions, about who gets which of them, and about webhooks.

Owns paths and documents, as ``operations`` does for all other calls. Must not open connections.
"""

from __future__ import annotations

from uuid import UUID

from fedselect import exchange
from fedselect.cohortdocs import (
    ChannelInfo,
    ChannelMove,
    ChannelName,
    CohortCreate,
    CohortInfo,
    Justified,
)
from fedselect.comparedoc import Comparison
from fedselect.exchange import Flow
from fedselect.explaindocs import AblationCreate, AblationInfo, AblationsAsked, Explanation
from fedselect.hooks import (
    DeliveryInfo,
    WebhookChange,
    WebhookCreate,
    WebhookInfo,
    WebhookIssued,
)
from fedselect.operations import Listing, Operations, listing, operation
from fedselect.protocol import ClientInfo
from fedselect.reportdoc import RunReport
from fedselect.rolloutdocs import RolloutCreate, RolloutDetail, RolloutInfo
from fedselect.tenancy import (
    ClientChange,
    Identity,
    KeyCreate,
    KeyInfo,
    KeyIssued,
    KeyRotate,
    MemberCreate,
    MemberInfo,
    ProjectChange,
    ProjectCreate,
    ProjectInfo,
)
from fedselect.versiondocs import Lineage, SpaceDocument, VersionCard, VersionDifference


class Administration(Operations):
    """Every call. All of them raise ``ServiceError`` when they do not succeed."""

    @operation
    def who_am_i(self) -> Flow[Identity]:
        """Role, scopes, organisation and project of the key that asks."""
        return self._get("/v1/me", Identity)

    @operation
    def rotate_own_key(self, rotation: KeyRotate) -> Flow[KeyIssued]:
        """A successor of the key that asks; it is shown this one time."""
        return self._post("/v1/me/key", KeyIssued, body=rotation)

    @operation
    def create_project(self, project: ProjectCreate) -> Flow[ProjectInfo]:
        """A new project in the organisation of the key."""
        return self._post("/v1/projects", ProjectInfo, body=project)

    @listing
    def projects(self) -> Listing[ProjectInfo]:
        """All projects of the organisation, or the one of the key."""
        return Listing("/v1/projects", ProjectInfo)

    @operation
    def project(self, project_id: UUID) -> Flow[ProjectInfo]:
        """One project."""
        return self._get(f"/v1/projects/{project_id}", ProjectInfo)

    @operation
    def edit_project(self, project_id: UUID, change: ProjectChange) -> Flow[ProjectInfo]:
        """Rename a project or limit its clients; what is not set in ``change`` stays."""
        path = f"/v1/projects/{project_id}"
        return exchange.patch(path, ProjectInfo, retries=self._retries, body=change)

    @operation
    def edit_client(self, client_id: UUID, change: ClientChange) -> Flow[ClientInfo]:
        """Give a client another name or other tags; what is not set in ``change`` stays."""
        path = f"/v1/clients/{client_id}"
        return exchange.patch(path, ClientInfo, retries=self._retries, body=change)

    @operation
    def create_key(self, key: KeyCreate) -> Flow[KeyIssued]:
        """A key for a person or a program; it is shown this one time."""
        return self._post("/v1/keys", KeyIssued, body=key)

    @listing
    def keys(self) -> Listing[KeyInfo]:
        """All keys, ended ones included; never a secret."""
        return Listing("/v1/keys", KeyInfo)

    @operation
    def key(self, key_id: str) -> Flow[KeyInfo]:
        """One key, without its secret."""
        return self._get(f"/v1/keys/{key_id}", KeyInfo)

    @operation
    def rotate_key(self, key_id: str, rotation: KeyRotate) -> Flow[KeyIssued]:
        """A key's successor; it is shown this one time."""
        return self._post(f"/v1/keys/{key_id}/rotate", KeyIssued, body=rotation)

    @operation
    def revoke_key(self, key_id: str) -> Flow[KeyInfo]:
        """End a key now."""
        return self._post(f"/v1/keys/{key_id}/revoke", KeyInfo)

    @operation
    def add_member(self, member: MemberCreate) -> Flow[MemberInfo]:
        """Let a person in who signs in with the identity provider."""
        return self._post("/v1/members", MemberInfo, body=member)

    @listing
    def members(self) -> Listing[MemberInfo]:
        """All memberships, ended ones included."""
        return Listing("/v1/members", MemberInfo)

    @operation
    def end_member(self, member_id: UUID) -> Flow[MemberInfo]:
        """End a membership now."""
        return self._post(f"/v1/members/{member_id}/end", MemberInfo)

    # --- arms ----------------------------------------------------------------------------------

    @operation
    def comparison(self, run_id: UUID) -> Flow[Comparison]:
        """A run's arms side by side, and which of them to use."""
        return self._get(f"/v1/runs/{run_id}/comparison", Comparison)

    # --- versions ------------------------------------------------------------------------------

    @operation
    def space(self, model_id: UUID) -> Flow[SpaceDocument]:
        """A model's parameter space: names and shapes of a version's tensors."""
        return self._get(f"/v1/models/{model_id}/space", SpaceDocument)

    @operation
    def lineage(self, version_id: UUID) -> Flow[Lineage]:
        """A version's ancestors and children."""
        return self._get(f"/v1/versions/{version_id}/lineage", Lineage)

    @operation
    def difference(self, version_id: UUID, *, base: UUID | None = None) -> Flow[VersionDifference]:
        """How far each tensor moved since ``base``, by default the parent."""
        query = {"base": str(base)} if base else {}
        path = f"/v1/versions/{version_id}/diff"
        return exchange.get(path, VersionDifference, retries=self._retries, query=query)

    @operation
    def card(self, version_id: UUID) -> Flow[VersionCard]:
        """A version's model card."""
        return self._get(f"/v1/versions/{version_id}/card", VersionCard)

    # --- who gets which version ----------------------------------------------------------------

    @operation
    def create_cohort(self, cohort: CohortCreate) -> Flow[CohortInfo]:
        """Name a set of clients."""
        return self._post("/v1/cohorts", CohortInfo, body=cohort)

    @listing
    def cohorts(self) -> Listing[CohortInfo]:
        """All cohorts."""
        return Listing("/v1/cohorts", CohortInfo)

    @operation
    def cohort(self, cohort_id: UUID) -> Flow[CohortInfo]:
        """One cohort."""
        return self._get(f"/v1/cohorts/{cohort_id}", CohortInfo)

    @listing
    def cohort_clients(self, cohort_id: UUID) -> Listing[ClientInfo]:
        """The active clients that belong to a cohort now."""
        return Listing(f"/v1/cohorts/{cohort_id}/clients", ClientInfo)

    @listing
    def channels(self, model_id: UUID) -> Listing[ChannelInfo]:
        """A model's channels that were set."""
        return Listing(f"/v1/models/{model_id}/channels", ChannelInfo)

    @operation
    def channel(self, model_id: UUID, name: ChannelName) -> Flow[ChannelInfo]:
        """One channel of a model."""
        return self._get(f"/v1/models/{model_id}/channels/{name}", ChannelInfo)

    @operation
    def move_channel(
        self, model_id: UUID, name: ChannelName, move: ChannelMove
    ) -> Flow[ChannelInfo]:
        """Point a channel at a version, at once and for all its clients."""
        path = f"/v1/models/{model_id}/channels/{name}"
        return exchange.put(path, ChannelInfo, retries=self._retries, body=move)

    @operation
    def roll_channel_back(
        self, model_id: UUID, name: ChannelName, why: Justified
    ) -> Flow[ChannelInfo]:
        """Take a channel's last move back."""
        return self._post(f"/v1/models/{model_id}/channels/{name}/roll-back", ChannelInfo, body=why)

    @operation
    def start_rollout(self, rollout: RolloutCreate) -> Flow[RolloutInfo]:
        """Bring a version to everybody, stage by stage."""
        return self._post("/v1/rollouts", RolloutInfo, body=rollout)

    @listing
    def rollouts(self) -> Listing[RolloutInfo]:
        """All rollouts."""
        return Listing("/v1/rollouts", RolloutInfo)

    @operation
    def rollout(self, rollout_id: UUID) -> Flow[RolloutDetail]:
        """One rollout with its groups, its gates and what was decided."""
        return self._get(f"/v1/rollouts/{rollout_id}", RolloutDetail)

    @operation
    def promote_rollout(self, rollout_id: UUID, why: Justified) -> Flow[RolloutDetail]:
        """Let it go on to its next stage, the last one to everybody."""
        return self._post(f"/v1/rollouts/{rollout_id}/promote", RolloutDetail, body=why)

    @operation
    def hold_rollout(self, rollout_id: UUID, why: Justified) -> Flow[RolloutDetail]:
        """Stop it where it is."""
        return self._post(f"/v1/rollouts/{rollout_id}/hold", RolloutDetail, body=why)

    @operation
    def roll_rollout_back(self, rollout_id: UUID, why: Justified) -> Flow[RolloutDetail]:
        """End it: everybody serves the old version again."""
        return self._post(f"/v1/rollouts/{rollout_id}/roll-back", RolloutDetail, body=why)

    # --- webhooks ------------------------------------------------------------------------------

    @operation
    def create_webhook(self, webhook: WebhookCreate) -> Flow[WebhookIssued]:
        """Tell an address of events from now on; the secret is shown this one time."""
        return self._post("/v1/webhooks", WebhookIssued, body=webhook)

    @listing
    def webhooks(self) -> Listing[WebhookInfo]:
        """All webhooks of the project."""
        return Listing("/v1/webhooks", WebhookInfo)

    @operation
    def webhook(self, webhook_id: UUID) -> Flow[WebhookInfo]:
        """One webhook, without its secret."""
        return self._get(f"/v1/webhooks/{webhook_id}", WebhookInfo)

    @operation
    def change_webhook(self, webhook_id: UUID, change: WebhookChange) -> Flow[WebhookInfo]:
        """Another address, other events, on or off; what is not set in ``change`` stays."""
        path = f"/v1/webhooks/{webhook_id}"
        return exchange.patch(path, WebhookInfo, retries=self._retries, body=change)

    @operation
    def rotate_webhook_secret(self, webhook_id: UUID) -> Flow[WebhookIssued]:
        """A new secret, shown this one time; for a day both sign."""
        return self._post(f"/v1/webhooks/{webhook_id}/secret", WebhookIssued)

    @operation
    def test_webhook(self, webhook_id: UUID) -> Flow[WebhookInfo]:
        """Send the event ``webhook.tested``."""
        return self._post(f"/v1/webhooks/{webhook_id}/test", WebhookInfo)

    @listing
    def deliveries(self, webhook_id: UUID, state: str | None = None) -> Listing[DeliveryInfo]:
        """What was sent to a webhook, or those ``waiting``, ``delivered`` or ``dead``."""
        path = f"/v1/webhooks/{webhook_id}/deliveries"
        return Listing(path, DeliveryInfo, {"state": state} if state else {})

    @operation
    def retry_delivery(self, delivery_id: UUID) -> Flow[DeliveryInfo]:
        """Send a dead delivery again."""
        return self._post(f"/v1/deliveries/{delivery_id}/retry", DeliveryInfo)

    # --- reports and explanations --------------------------------------------------------------

    @operation
    def run_report(
        self,
        run_id: UUID,
        *,
        arm: str | None = None,
        fedavg: UUID | None = None,
        rerun: UUID | None = None,
    ) -> Flow[RunReport]:
        """What an arm of a run (by default its first) did for each client, also against a
        ``fedavg`` run of the same settings, and a ``rerun`` with another seed.
        """
        others = {"arm": arm, "fedavg": fedavg, "rerun": rerun}
        query = {name: str(other) for name, other in others.items() if other}
        path = f"/v1/runs/{run_id}/report"
        return exchange.get(path, RunReport, retries=self._retries, query=query)

    @operation
    def ask_ablations(self, version_id: UUID, asked: AblationCreate) -> Flow[AblationsAsked]:
        """Ask clients what their personal parts are worth with this version."""
        return self._post(f"/v1/versions/{version_id}/ablations", AblationsAsked, body=asked)

    @listing
    def ablations(self, version_id: UUID) -> Listing[AblationInfo]:
        """Who was asked for an ablation of a version, and who has answered."""
        return Listing(f"/v1/versions/{version_id}/ablations", AblationInfo)

    @operation
    def explanation(
        self, run_id: UUID, client_id: UUID, *, arm: str | None = None
    ) -> Flow[Explanation]:
        """What of a client's model is its own, and what that is worth."""
        path = f"/v1/runs/{run_id}/clients/{client_id}/explanation"
        query = {"arm": arm} if arm else {}
        return exchange.get(path, Explanation, retries=self._retries, query=query)
