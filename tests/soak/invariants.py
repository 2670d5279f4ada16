"""What must hold whatever happened: invariants I1 to I13, asked of rows, objects and ledger.

Tripwires (:func:`arm`) watch from inside the database for what may never happen at any moment;
:func:`broken` looks at everything once the dust has settled. Every text is one violation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np

from app.ledgercheck import check_ledger
from app.objects import check_objects
from fedselect import Mask, wire
from fedselect.manifestdocs import Manifest
from fedselect.recompute import recompute

from .stack import Stack

DUE = 30  # seconds after which a due job must have been taken (I10)

# Each query gives what is wrong; no row, no violation.
QUERIES = {
    "I1 a completed upload has an outcome": """
        SELECT u.id, a.state, a.reason, r.state FROM uploads u
        JOIN assignments a ON a.id = u.assignment_id JOIN rounds r ON r.id = a.round_id
        WHERE u.completed_at IS NOT NULL
          AND a.state NOT IN ('accepted', 'late')
          AND NOT (a.state = 'rejected' AND a.reason IS NOT NULL)
          AND NOT (a.state = 'uploaded' AND r.state IN ('selecting', 'collecting'))""",
    "I1 what is accepted is an update": """
        SELECT a.id FROM assignments a
        LEFT JOIN updates p ON p.assignment_id = a.id AND p.withdrawn_at IS NULL
        WHERE a.kind = 'train' AND (a.state = 'accepted') <> (p.id IS NOT NULL)""",
    "I1 an update is in its round's manifest": """
        SELECT p.id FROM updates p JOIN manifests m ON m.round_id = p.round_id
        WHERE (p.withdrawn_at IS NOT NULL) = EXISTS (
            SELECT FROM jsonb_array_elements(m.body::jsonb -> 'updates') e
            WHERE e ->> 'sha256' = p.sha256 AND (e ->> 'number')::int = p.number)""",
    "I2 a manifest names every update of its round once": """
        SELECT m.round_id FROM manifests m
        WHERE jsonb_array_length(m.body::jsonb -> 'updates')
            <> (SELECT count(*) FROM updates p
                WHERE p.round_id = m.round_id AND p.withdrawn_at IS NULL)
           OR jsonb_array_length(m.body::jsonb -> 'updates')
            <> (SELECT count(DISTINCT e ->> 'client')
                FROM jsonb_array_elements(m.body::jsonb -> 'updates') e)""",
    "I2 a client contributes to a round once": """
        SELECT round_id, client_id FROM updates GROUP BY 1, 2 HAVING count(*) > 1""",
    "I3 versions are gapless": """
        SELECT arm_id FROM versions WHERE arm_id IS NOT NULL
        GROUP BY 1 HAVING min(number) <> 0 OR max(number) <> count(*) - 1""",
    "I3 a version follows its round and its parent": """
        SELECT v.id FROM versions v JOIN rounds r ON r.id = v.round_id
        LEFT JOIN versions p ON p.id = v.parent_id
        WHERE v.number <> r.number OR p.id IS NULL OR p.number <> v.number - 1""",
    "I5 published means one version": """
        SELECT r.id, r.state FROM rounds r LEFT JOIN versions v ON v.round_id = r.id
        WHERE (r.state = 'published') <> (v.id IS NOT NULL)""",
    "I5 history is one unbroken line": """
        SELECT subject_id FROM (
            SELECT subject_id, from_state,
                   lag(to_state) OVER (PARTITION BY subject_id ORDER BY id) AS before
            FROM transitions) t
        WHERE from_state IS DISTINCT FROM before AND before IS NOT NULL""",
    "I5 history ends in the present state": """
        SELECT r.id FROM (SELECT id, state FROM rounds UNION ALL SELECT id, state FROM runs
                          UNION ALL SELECT id, state FROM assignments
                          UNION ALL SELECT id, state FROM rollouts) r
        WHERE r.state <> (SELECT to_state FROM transitions
                          WHERE subject_id = r.id ORDER BY id DESC LIMIT 1)""",
    "I13 what is promoted has moved its channel, nothing else has": """
        SELECT r.id, r.state FROM rollouts r WHERE (r.state = 'promoted') <> EXISTS (
            SELECT FROM ledger_entries e WHERE e.action = 'channel.moved'
              AND e.subject = 'model:' || r.model_id AND e.body ->> 'to' = r.version_id::text)""",
    "I13 whoever a stage has reached was asked once": """
        SELECT r.id, c.client_id FROM rollouts r JOIN rollout_clients c ON c.rollout_id = r.id
        WHERE (c.stage IS NULL OR c.stage <= r.stage) AND 1 <> (
            SELECT count(*) FROM assignments a WHERE a.rollout_id = r.id
              AND a.client_id = c.client_id AND a.attempt = r.stage + 1)""",
    "I10 every due job is taken": f"""
        SELECT id, kind, state, attempts FROM jobs
        WHERE (state = 'due' AND run_after < now() - interval '{DUE} s')
           OR (state = 'leased' AND lease_until < now() - interval '{DUE} s')""",
    "I9 no sum is kept for a round that has ended": """
        SELECT s.round_id, s.part FROM partial_sums s JOIN rounds r ON r.id = s.round_id
        WHERE r.state IN ('published', 'abandoned', 'cancelled')""",
    "I5, I9 tripwires": "SELECT what FROM soak_tripped",
}

TRIPWIRES = """
CREATE TABLE IF NOT EXISTS soak_tripped (what text, at timestamptz DEFAULT clock_timestamp());
CREATE OR REPLACE FUNCTION soak_trip() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO soak_tripped (what) VALUES (TG_ARGV[0] || ': ' || OLD.*::text);
    RETURN COALESCE(NEW, OLD);
END $$;
"""
# What no moment may show: the change, its condition, and how to call it.
FORBIDDEN = [
    ("jobs UPDATE", "NEW.lease_epoch < OLD.lease_epoch", "I9 a lease epoch went back"),
    (
        "jobs UPDATE",
        "OLD.state = 'done' AND NEW.state <> 'done' AND OLD.kind <> 'fold'",
        "I9 a finished job was opened",
    ),
    (
        "updates UPDATE",
        "OLD.withdrawn_at IS DISTINCT FROM NEW.withdrawn_at AND OLD.withdrawn_at IS NOT NULL",
        "I1 an update that was withdrawn came back",
    ),
    (
        "rounds UPDATE",
        "OLD.state IN ('published', 'abandoned', 'cancelled') AND NEW.state <> OLD.state",
        "I5 an ended round changed",
    ),
    (
        "versions UPDATE",
        "(NEW.sha256, NEW.number, NEW.size) IS DISTINCT FROM (OLD.sha256, OLD.number, OLD.size)",
        "I5 a version changed",
    ),
    ("manifests UPDATE", "NEW.body <> OLD.body", "I5 a manifest changed"),
    (
        "updates UPDATE",
        "(NEW.number, NEW.sha256) IS DISTINCT FROM (OLD.number, OLD.sha256)",
        "I1 an update changed",
    ),
    ("versions DELETE", "true", "I5 a version was deleted"),
    ("updates DELETE", "true", "I1 an update was deleted"),
]


def arm(stack: Stack) -> None:
    """Lay the tripwires."""
    stack.rows(TRIPWIRES)
    for number, (what, condition, words) in enumerate(FORBIDDEN):
        table, event = what.split()
        stack.rows(
            f"CREATE OR REPLACE TRIGGER soak_{number} BEFORE {event} ON {table} FOR EACH ROW "
            f"WHEN ({condition}) EXECUTE FUNCTION soak_trip('{words}')"
        )


def wrong_rows(stack: Stack) -> list[str]:
    """What the rows alone give away; quick."""
    return [f"{name}: {row}" for name, query in QUERIES.items() for row in stack.rows(query)]


def broken(stack: Stack) -> list[str]:
    """Every violation of an invariant, in words."""
    found = [*wrong_rows(stack), *_versions(stack)]
    found += [f"I7, I8 {text}" for text in check_ledger(stack.core).findings]
    objects = check_objects(stack.core)
    found += [f"I11 no row knows {key}" for key in objects.strays]
    found += [f"I11 {key}: {why}" for key, why in objects.missing]
    return found


def _versions(stack: Stack) -> Iterator[str]:
    """I4 and I6: every published version follows from its manifest, and k is kept."""
    rows = stack.rows(
        "SELECT v.object_key, v.sha256, m.body FROM versions v JOIN manifests m USING (round_id)"
    )
    for key, sha256, body in rows:
        manifest = Manifest.model_validate(json.loads(body))
        data = stack.core.storage.read(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            yield f"I4 {key} is not the file that was published"
        elif recompute(manifest, stack.core.storage.read) != data:
            yield f"I4 {key} is not what its manifest leads to"
        elif _moved_alone(stack, manifest, data):
            yield f"I6 {key} moved elements that fewer than k clients share"


def _moved_alone(stack: Stack, manifest: Manifest, data: bytes) -> bool:
    sharers = np.zeros(manifest.elements, dtype=np.int64)
    for update in manifest.updates:
        packed = stack.core.storage.read(update.mask_object)
        sharers += ~Mask.from_bytes(manifest.elements, packed).to_bool()
    values, base = (
        wire.decode_version(raw, space_digest=manifest.space, dim=manifest.elements)
        for raw in (data, stack.core.storage.read(manifest.base_object))
    )
    return bool((values != base)[sharers < manifest.min_contributors].any())
