"""From local work to an update file, with error feedback.

Owns what an encoding of deltas loses: it is added to the next round's delta, so that nothing of
what was learned is lost for good. The remainder is part of the personal state, tentative with it,
and never leaves the client. Must not train or talk to anyone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedselect.deltas import delta_encoding, quantise
from fedselect.masks import Mask
from fedselect.personal import Participation, PersonalState
from fedselect.space import FloatVector
from fedselect.wire import UpdateMeta, encode_delta, encode_update


def write_update(
    meta: UpdateMeta,
    done: Participation,
    *,
    base: FloatVector,
    before: PersonalState | None,
    known: Mask | None,
    send_mask: bool,
) -> tuple[bytes, PersonalState]:
    """The update file of a participation, and the state that follows from it.

    ``base`` (D,) is the version that training started from, ``before`` the state, ``known`` the
    mask that the coordinator holds, if that is at hand. The remainder of an element that has turned
    personal is dropped.

    Raises:
        WireError: a shared value is not finite, or not within the encoding's range.
    """
    if meta.encoding == "f32":
        return encode_update(meta, done.theta, mask=done.mask, send_mask=send_mask), done.state
    delta = done.theta - base
    if before is not None and before.residual is not None:
        delta += before.residual
    rest = np.empty_like(delta)
    codes = quantise(delta, delta_encoding(meta.encoding), done.mask, rest=rest)
    data = encode_delta(meta, codes, mask=done.mask, send_mask=send_mask, known=known)
    return data, replace(done.state, residual=rest)
