"""The table in ``docs/RELIABILITY.md``, between its two marks."""

from __future__ import annotations

from collections.abc import Sequence

from .proofs import Json, Proof

BEGIN, END = "<!-- results: written by make soak -->", "<!-- end of results -->"
HEAD = "| promise | proof | target | measured | | when |\n|---|---|---|---|---|---|"


def render(page: str, proofs: Sequence[Proof], results: Sequence[Json]) -> str:
    """The page with a fresh table."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError("docs/RELIABILITY.md has lost the marks around its table")
    rows = "\n".join(_row(proof, _newest(proof, results)) for proof in proofs)
    return f"{before}{BEGIN}\n{HEAD}\n{rows}\n{END}{after}"


def _newest(proof: Proof, results: Sequence[Json]) -> Json | None:
    """The newest full result, otherwise the newest quick one."""
    mine = [r for r in results if r["proof"] == proof.name]
    full = [r for r in mine if r["form"] == "full"]
    return (full or mine or [None])[-1]


def _row(proof: Proof, result: Json | None) -> str:
    cells = [proof.promise, f"{proof.test} (`{proof.name}`)", proof.target]
    if result is None:
        return f"| {' | '.join([*cells, 'not run yet', '', ''])} |"
    word = "met" if result["met"] else "**missed**"
    place = f"{result['machine']}, {result['seconds']:.0f} s"
    when = f"{result['form']}, {result['date']}, `{result['commit']}`, seed {result['seed']}"
    measured = str(result["measured"]).replace("|", "/").replace("\n", " ")
    return f"| {' | '.join([*cells, measured, word, f'{when}; {place}'])} |"
