"""A project that has trained two versions and may roll one out, for tests of who gets which."""

from __future__ import annotations

from .factories import (
    REPORT,
    contribute,
    drain,
    everything,
    make_clients,
    make_model,
    make_run,
    ok,
    pass_time,
)

WHY = {"reason": "agreed"}


def scores(points, *, harmed=False):
    """An evaluation of a version that is so many points better than the one before."""
    served = 100 if harmed else 500 + 10 * points
    return {
        "scores": {
            "post": {"correct": served, "total": 1000, "loss": 0.4},
            "before": {"correct": 500, "total": 1000, "loss": 0.4},
        }
    }


class World:
    """A project whose clients have trained two versions; the older one is stable."""

    def __init__(self, project, count=6):
        self.project, self.owner = project, project.owner
        self.model = make_model(project)
        self.clients = {c.id: c for c in make_clients(project, count)}
        self.run = make_run(project, self.model, rounds=2)
        for number in range(2):
            for seed, client in enumerate(list(self.clients.values())[:2]):
                contribute(client, self.model, seed=10 * number + seed)
            drain(project)
        for client in self.clients.values():
            path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
            ok(client.post(path, REPORT), 201)
        self.versions = everything(self.owner, f"/v1/runs/{self.run['id']}/versions")
        self.channels = f"/v1/models/{self.model.id}/channels"
        self.names = iter(f"rollout-{k}" for k in range(100))

    def set(self, name="stable", number=1, **more):
        body = {"version_id": self.versions[number]["id"], **WHY, **more}
        return ok(self.owner.request("PUT", f"{self.channels}/{name}", body))

    def body(self, **changes):
        asked = {
            "name": next(self.names),
            "model_id": self.model.id,
            "version_id": self.versions[2]["id"],
            "stages": [10, 100],
            "minimum": 2,
            "control": 10,
        }
        return {**asked, **changes}

    def start(self, **changes):
        return ok(self.owner.post("/v1/rollouts", self.body(**changes)), 201)

    def show(self, rollout):
        return ok(self.owner.get(f"/v1/rollouts/{rollout['id']}"))

    def order(self, rollout, command, **body):
        return self.owner.post(f"/v1/rollouts/{rollout['id']}/{command}", {**WHY, **body})

    def group(self, rollout, which):
        return [self.clients[each["client_id"]] for each in self.show(rollout)[which]]

    def report(self, rollout, stage, control=0):
        """Everybody who is asked says how good its version is; dicts are reports themselves."""
        for which, said in (("members", stage), ("control", control)):
            for client in self.group(rollout, which):
                body = said if isinstance(said, dict) else scores(said)
                path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
                ok(client.post(path, {**REPORT, **body}), 201)
        pass_time(self.project)
        return self.show(rollout)

    def served(self, client):
        found = client.check_in()["serving"]
        return found and (found["channel"], found["version"]["number"])

    def entries(self, prefix):
        rows = self.project.sql(
            "SELECT action, body FROM ledger_entries WHERE project_id = :project"
            " AND action LIKE :prefix ORDER BY id",
            prefix=f"{prefix}%",
        )
        return [(action, body) for action, body in rows]
