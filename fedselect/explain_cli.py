"""The ``explain`` command: what of this site's model is its own, for the site's own people.

Owns its options and what it prints. It reads the agent's folder without a lock, asks no server and
sends nothing. Must not compute anything itself, nor load torch before the command runs.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from fedselect import agent_cli, explainpage
from fedselect.errors import FedSelectError
from fedselect.explaindocs import Explanation
from fedselect.explaining import Ablated, Known, Subject, explain
from fedselect.policies import Disclosure, Policy, Reporting, RunSettings
from fedselect.serving import Kept, load_kept
from fedselect.tasks import load_task, task_arguments
from fedselect.wire import decode_version


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain")(explain_here)


def explain_here(
    task: agent_cli.TaskSpec,
    state: agent_cli.State,
    task_arg: agent_cli.TaskArg = None,
    arm: Annotated[UUID | None, typer.Option(help="Which of several arms.")] = None,
    version: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A version file with the shared values; else the one last trained from.",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write it as a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain what of this site's model is its own, and what that is worth on its held-out data.

    Nothing leaves the site. Whether other sites chose the same is known to the server alone.
    """
    kept = load_kept(state, arm=arm)
    shared = version.read_bytes() if version is not None else kept.base
    if shared is None:
        raise FedSelectError(
            "the version that was last trained from is not in the folder: name a version file",
            code="version_missing",
        )
    found = _explained(kept, shared, task, task_arg or [])
    if html is not None:
        html.write_text(explainpage.page(found), "utf-8")
    if as_json:
        typer.echo(found.model_dump_json())
        return
    for line in [*found.summary, "", *(each.text for each in found.tensors)]:
        typer.echo(line)


def _explained(kept: Kept, shared: bytes, task: str, arguments: list[str]) -> Explanation:
    from fedselect.explain import TorchExplainer
    from fedselect.training import TorchLearner

    learner = TorchLearner(load_task(task, **task_arguments(arguments)))
    base = decode_version(shared, space_digest=learner.space.digest, dim=learner.space.dim)
    run = kept.run.settings if kept.run else RunSettings(policy=Policy(name="unknown"))
    # At its own site nothing is withheld or rounded.
    told = {"report": Reporting(min_examples=1), "disclosure": Disclosure()}
    settings = run.model_copy(update=told)
    report = TorchExplainer(learner).ablate(kept.state, base, settings=settings)
    now = datetime.now(UTC)
    name = kept.run.name if kept.run else None
    subject = Subject(kept.client or "this site", task, kept.round, run_name=name)
    known = Known(learner.space, kept.state.merge_mask, ablated=Ablated(report, None, now))
    return explain(subject, settings, known, made_at=now)
