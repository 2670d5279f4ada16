"""The words of a model card: what a version is not, and the card as Markdown.

Owns the text alone; every figure is in the document that it is made from.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedselect.protocol import PrivacyAccount
from fedselect.versiondocs import CardEvaluation, CardOrigin, VersionCard

NAMES = {
    "local_only": "trained alone for as long",
    "start": "the model that the run began with",
    "global": "these shared parameters alone",
    "pre": "with a client's personal part",
    "post": "after a client's last training",
}


def limitations(
    origin: CardOrigin | None,
    evaluation: CardEvaluation | None,
    *,
    recomputable: bool,
    privacy: PrivacyAccount | None = None,
) -> list[str]:
    """What nobody should read into a version."""
    found = [
        "These are the shared parameters. What clients keep personal never left them and is not in "
        "this version; a client without a personal part should train before it serves.",
        "No differential privacy was applied to it." if privacy is None else privacy.claim,
    ]
    if origin is not None and origin.round_number is not None and privacy is None:
        k = origin.settings.round.min_contributors
        found.append(
            "An element that a single client shares is that client's own value (min_contributors "
            "is 1)."
            if k == 1
            else f"An element that fewer than {k} clients share is as it was before."
        )
        found += _unbounded(origin)
    if evaluation is None:
        found.append("Too few clients have reported how good it is, or none.")
    else:
        found.append("Scores are the clients' own, each on its own held-out data.")
    if not recomputable:
        found.append("Files behind it were deleted: it cannot be recomputed any more.")
    return found


def _unbounded(origin: CardOrigin) -> list[str]:
    """What is to be said where nothing keeps a client from moving the version far."""
    rules, bounded = origin.settings.influence, origin.settings.privacy.dp is not None
    if rules is not None:  # a rule alone is the plain mean where few share an element
        bounds = (rules.clip_norm, rules.clip_quantile, rules.max_change)
        bounded = bounded or any(each is not None for each in bounds)
    return [] if bounded else ["Nothing but the limits of a file bounds what one client may do."]


def markdown(card: VersionCard) -> str:
    """The card for people; its own ``markdown`` does not matter."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: VersionCard) -> Iterator[str]:
    version, counts = card.version, card.parameters
    yield f"# {card.model_name}, version {version.number}"
    yield ""
    yield from _table(
        ("id", f"`{version.id}`"),
        ("SHA-256", f"`{version.sha256}`"),
        ("published", f"{version.created_at:%Y-%m-%d %H:%M} UTC"),
        ("size", f"{version.size:,} bytes"),
        ("parameters", f"{counts.elements:,} in {counts.tensors:,} tensors"),
        ("may turn personal", f"{counts.selectable:,}"),
        ("always shared", f"{counts.shared:,}"),
        ("never travel", f"{counts.personal:,} personal, {counts.frozen:,} frozen"),
    )
    yield from _why(card)
    if card.privacy is not None:
        yield from _how_private(card.privacy)
    if card.evaluation is not None:
        yield from _how_good(card.evaluation)
    yield from ("", "## Limits", "")
    yield from (f"- {text}" for text in card.limitations)


def _why(card: VersionCard) -> Iterator[str]:
    version, origin = card.version, card.origin
    yield from ("", "## Why it exists", "")
    if origin is None:
        yield "The weights with which the model was registered."
        return
    policy, rules = origin.settings.policy, origin.settings.round
    rows = [
        ("run", f"{origin.run_name} (`{origin.run_id}`), {origin.run_state}"),
        ("policy", f"{policy.name}: {policy.personal}, score {policy.score}"),
        ("encoding", version.encoding),
        ("code", f"fedselect {version.code_version}"),
    ]
    if origin.round_number is not None:
        rows += [
            ("round", f"{origin.round_number}, attempt {origin.attempt}"),
            (
                "averaged",
                f"{origin.updates} updates" + _behind(origin.examples),
            ),
            ("weights", f"{rules.weighting}, at least {rules.min_contributors} clients an element"),
            ("parent", f"`{version.parent_id}`"),
            ("manifest", f"`{version.manifest_sha256}`"),
        ]
    else:
        rows.append(("", "the weights that the run began with"))
    yield from _table(*rows)


def _how_private(found: PrivacyAccount) -> Iterator[str]:
    yield from ("", "## Differential privacy", "")
    yield from _table(
        ("ε of this and all earlier versions", f"{found.spent:.3g} at δ = {found.delta:g}"),
        ("budget of the run", f"ε = {found.budget:g}, {found.rounds} rounds"),
        ("clip and noise", f"{found.clip:g}, {found.noise:.3g} times that on a round's sum"),
    )


def _behind(examples: int | None) -> str:
    return "" if examples is None else f", at least {examples:,} examples behind them"


def _how_good(found: CardEvaluation) -> Iterator[str]:
    yield from ("", "## How good it is", "")
    yield (
        f"{found.clients} clients, {found.examples:,} held-out examples, "
        f"{found.personal_share:.1%} of a client's parameters personal on average."
    )
    yield from (
        "",
        "| accuracy, % | all examples | mean client | worst clients |",
        "|---|---|---|---|",
    )
    for name, score in found.scores.items():
        cells = (score.pooled, score.mean, score.worst)
        yield f"| {NAMES.get(name, name)} | " + " | ".join(f"{100 * c:.1f}" for c in cells) + " |"


def _table(*rows: tuple[str, str]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {text} |" for name, text in rows)
