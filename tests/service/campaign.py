"""A run of which some rounds have been published, for tests of what becomes of its files."""

from __future__ import annotations

from dataclasses import replace

from .factories import contribute, drain, everything, make_clients, make_model, make_run


class Campaign:
    """A run of which some rounds have been published."""

    def __init__(self, project, *, rounds=4, published=3, **rules):
        self.project, self.core = project, project.core
        self.model = make_model(project)
        self.run = make_run(project, self.model, rounds=rounds, **rules)
        self.clients = make_clients(project, 2)
        for number in range(published):
            self.round(number)

    def round(self, number):
        for seed, client in enumerate(self.clients):
            contribute(client, self.model, seed=10 * number + seed)
        drain(self.project)

    def versions(self):
        return everything(self.project.owner, f"/v1/runs/{self.run['id']}/versions")

    def rounds(self):
        return everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")

    def recomputable(self):
        return {v["number"]: v["recomputable"] for v in self.versions()}

    def manifest(self, number, **params):
        (found,) = (r for r in self.rounds() if r["number"] == number and r["manifest_sha256"])
        return self.project.owner.get(f"/v1/rounds/{found['id']}/manifest", **params)

    def keys(self, kind=""):
        """This project's objects that are in the store and not given up."""
        return {
            key
            for (key,) in self.project.sql(
                "SELECT key FROM objects WHERE project_id = :project AND deletion_id IS NULL "
                "AND key LIKE :kind",
                kind=f"{kind}%",
            )
            if self.core.storage.size(key) is not None
        }

    def entries(self, action):
        return [
            body
            for (body,) in self.project.sql(
                "SELECT body FROM ledger_entries WHERE action = :action ORDER BY id", action=action
            )
        ]


def eager(core, **settings):
    """The coordinator of an operator with other settings."""
    return replace(core, settings=core.settings.model_copy(update=settings))
