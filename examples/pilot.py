"""A guided pilot on real parts: three of ten sites try it, the gates look on, then everybody gets
it – and a bad version is held and taken back.

`make demo SCENARIO=pilot` runs this: the local stack, ten agent processes, and the very commands
that an operator types, printed as they are run. Exit code 0 if the good version reached everybody
and the bad one did not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

from demo import FEDSELECT, Demo, add_model, agents, console, local_stack, new_project

from fedselect import RunSettings
from fedselect.agent import enrol
from fedselect.agent_state import AgentFolder
from fedselect.client import Client
from fedselect.errors import FedSelectError
from fedselect.tasks import example_clients

GOOD, BAD, TASK = "wards", "hasty", "watch"
FEW, ROUNDS, WIDTH = 3, 24, 100
PATIENCE = 600  # seconds for one command
OPTIONS = "--check-in 0.5 --link dsl --stages 30,60,100 --harmed 0.34"


@dataclass
class Tour:
    """What the steps share; ``said`` is everything that was printed."""

    demo: Demo
    environment: dict[str, str]
    place: Path
    rounds: int = ROUNDS
    said: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Say what happens, in plain words."""
        self._print("\n" + fill(text, WIDTH) + "\n")

    def pilot(self, line: str, *, refused: bool = False) -> str:
        """Run a ``fedselect pilot`` command as an operator does, and show what it prints."""
        self._print(f"$ fedselect pilot {line}")
        try:
            done = subprocess.run(
                [FEDSELECT, "pilot", *shlex.split(line)],
                cwd=self.place,
                env={**os.environ, **self.environment, "COLUMNS": str(WIDTH)},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise FedSelectError(f"not over after {PATIENCE} s: fedselect pilot {line}") from error
        if bool(done.returncode) is not refused:
            raise FedSelectError(f"fedselect pilot {line}: {done.stdout}{done.stderr}")
        said = (done.stderr if refused else done.stdout).splitlines()
        self._print("\n".join(each.rstrip() for each in said))
        return "\n".join(said)

    def state(self, name: str) -> str:
        """Where the rollout of a pilot is."""
        found = {each.name: each.state.value for each in self.demo.admin.rollouts()}
        return found.get(name, "none")

    def _print(self, text: str) -> None:
        self.said.append(text)
        console.print(text, markup=False, highlight=False, soft_wrap=True)


# --- the story ---------------------------------------------------------------------------------


def tour(here: Tour) -> bool:
    """The whole story; True if it ended as it should."""
    sites = list(here.demo.sites)
    here.tell(
        f"{len(sites)} sites, each with the smartwatch data of one person, share a model. {FEW} "
        "of them are to try personalization first. `init` asks a few questions, or takes options, "
        "says what it would cost, and writes a file. Nothing has begun then."
    )
    who = ",".join(sites[:FEW])
    here.pilot(f"init {GOOD}.yaml --yes --clients {who} --rounds {here.rounds} {OPTIONS}")
    here.pilot(f"start {GOOD}.yaml")
    with agents(here.demo):
        good = try_it(here) and give_it_out(here)
        return good and take_it_back(here)


def try_it(here: Tour) -> bool:
    """The pilot itself, up to its report."""
    here.tell("The agents train, each on its own data; the other sites wait.")
    here.pilot(f"watch {GOOD}.yaml --every 0.5")
    here.tell("What has it brought, and to whom? The report is a page, a table and a document.")
    said = here.pilot(f"report {GOOD}.yaml")
    here.tell(
        "A person's own watch data go far: on this task training alone is as good in the mean as "
        "personalized models (docs/DEMO.md), and a few sites and a few rounds do not change that. "
        "Such a report is a reason to stop. This story goes on, because a site has nothing of its "
        "own yet: what it serves now is the model that the pilot started from, and that is what "
        "gates compare with."
    )
    return f"{GOOD}.html" in said


def give_it_out(here: Tour) -> bool:
    """Stage by stage to everybody."""
    here.tell(
        "A rollout begins with a few sites by lot; others stay on the old version to compare with. "
        "Every stage measures, then its gates speak."
    )
    here.pilot(f"promote {GOOD}.yaml --reason 'others should measure it, too'")
    here.pilot(f"watch {GOOD}.yaml --every 0.5")
    here.tell(
        f"Gates that speak of all sites need ten in each group; of {len(here.demo.sites)} sites "
        "they say so, and leave it to a person. The decision and its reason go into the ledger."
    )
    for which in ("second", "last"):
        here.pilot(f"promote {GOOD}.yaml --reason 'no harm beyond the limit: {which} stage'")
        here.pilot(f"watch {GOOD}.yaml --every 0.5")
    here.pilot(f"promote {GOOD}.yaml --reason 'no harm beyond the limit: everybody'")
    return here.state(GOOD) == "promoted"


def take_it_back(here: Tour) -> bool:
    """A version that should never have been made."""
    here.tell(
        "Now somebody is in a hurry: one round of large steps, and an average of what has "
        "drifted apart. All sites take part."
    )
    who = ",".join(here.demo.sites)
    more = "--policies fedavg --rounds 1 --steps 100"
    here.pilot(f"init {BAD}.yaml --yes --clients {who} {more} {OPTIONS}")
    path = here.place / f"{BAD}.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.05", "learning_rate: 0.5"))
    here.tell("(In the file, learning_rate goes from 0.05 to 0.5.)")
    here.pilot(f"start {BAD}.yaml")
    here.pilot(f"watch {BAD}.yaml --every 0.5")
    here.pilot(f"promote {BAD}.yaml --reason 'it trained so fast'")
    here.pilot(f"watch {BAD}.yaml --every 0.5")
    here.tell(
        "The gate holds it at the first stage: the sites have measured that it harms them. Asking "
        "alone does not make it go on:"
    )
    refused = here.pilot(f"promote {BAD}.yaml --reason 'let us see'", refused=True)
    held = here.state(BAD) == "held" and "harmed_share" in refused
    here.pilot(f"rollback {BAD}.yaml --reason 'it harms the sites that have it'")
    rollouts = {each.name: each for each in here.demo.admin.rollouts()}
    good = rollouts[GOOD]
    stable = here.demo.admin.channel(good.model_id, "stable").version
    here.tell(f"All {len(here.demo.sites)} sites serve the version of {GOOD} again.")
    return held and here.state(BAD) == "rolled_back" and stable.id == good.version_id


# --- set-up ------------------------------------------------------------------------------------


def join(sites: Demo) -> None:
    """Give every site its place and its key, before its agent starts."""
    tokens = sites.admin.create_enrolments(len(sites.sites)).tokens
    with Client(sites.url) as nobody:
        for name, token in zip(sites.sites, tokens, strict=True):
            folder = AgentFolder(sites.folder(name))
            try:
                enrol(nobody, folder, token=token, name=name)
            finally:
                folder.close()


@contextmanager
def prepared(root: Path, environment: dict[str, str], sites: int) -> Iterator[Tour]:
    """A project of its own, its model and its sites, all of which are there but not at work."""
    project, key = new_project(environment)
    url = environment["PUBLIC_URL"]
    place = (root / "pilots" / project).resolve()
    place.mkdir(parents=True)
    some = dict(list(example_clients(TASK).items())[:sites])
    with Client(url, key=key) as admin:
        shared = Demo(TASK, some, RunSettings(), root, url, admin, project, stay=True)
        add_model(shared)
        join(shared)
        where = {"FEDSELECT_SERVER": url, "FEDSELECT_KEY": key}
        yield Tour(shared, where, place)


def save(path: Path, here: Tour, seconds: float) -> None:
    """Write what was printed to a page."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    text = "\n".join(here.said).replace(str(here.place), "…")
    path.write_text(
        f"# What `make demo SCENARIO=pilot` printed\n\nOn {time.strftime('%Y-%m-%d')}, commit "
        f"{commit.stdout.strip() or 'unknown'}, {os.cpu_count()} cores, "
        f"{platform.python_implementation()} {platform.python_version()}, {seconds:.0f} s after "
        f"the stack was up. [PILOT.md](PILOT.md) explains it.\n\n```text\n{text}\n```\n"
    )


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".fedselect"))
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    parser.add_argument("--save", type=Path, help="write what is printed to this Markdown file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            local_stack(options.root, options.keep) as stack,
            prepared(options.root, stack.environment(), 10) as here,
        ):
            begun = time.monotonic()
            ok = tour(here)
            seconds = time.monotonic() - begun
            here.tell(f"All in {seconds:.0f} s. Who gained, who lost, what it cost, as a page:")
            here._print(str(here.place / f"{GOOD}.html"))
            if options.save:
                save(options.save, here, seconds)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except FedSelectError as error:
        console.print(f"error[{error.code}]: {error}", style="red", markup=False)
        return 1
    console.print("[green]demo passed[/green]" if ok else "[red]demo failed[/red]")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
