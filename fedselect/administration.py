"""The calls of administrators about access (who they are, projects, keys) and about versions.

Owns paths and documents, as ``operations`` does for all other calls. Must not open connections.
"""

from __future__ import annotations

from uuid import UUID

from fedselect import exchange
from fedselect.exchange import Flow
from fedselect.operations import Listing, Operations, listing, operation
from fedselect.protocol import ClientInfo
from fedselect.tenancy import (
    ClientChange,
    Identity,
    KeyCreate,
    KeyInfo,
    KeyIssued,
    KeyRotate,
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
