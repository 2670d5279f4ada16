"""Version files at a client: what it has, a chain of deltas, or the whole file.

Owns how an agent comes by the versions that its work names, and which of them it keeps. Whatever is
wrong with a delta, the whole file is right, so that is what is fetched then. Must not train, or
know how rounds go.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedselect.agent_state import AgentFolder, Arm
from fedselect.checkindocs import Assignment, DeltaDownload
from fedselect.client import Client
from fedselect.deltafiles import patch
from fedselect.errors import ServiceError, WireError
from fedselect.exchange import DOWNLOAD_MISMATCH, STORE_REFUSED
from fedselect.heterogeneity import apart
from fedselect.personal import PersonalState
from fedselect.protocol import VersionInfo
from fedselect.space import FloatVector, ParameterSpace
from fedselect.wire import decode_version, file_digest


class Versions:
    """The version files in an agent's folder; what is missing is fetched, counted and kept."""

    def __init__(self, client: Client, folder: AgentFolder, space: ParameterSpace) -> None:
        self._client = client
        self._folder = folder
        self._space = space
        self._recent: tuple[str, bytes] | None = None  # the last one that was brought

    def base(self, arm: Arm, work: Assignment) -> FloatVector:
        """The version that an assignment starts from, shape (D,); of the others, all but the
        arm's first and those that work in any arm of this run was trained from, are forgotten.

        Raises:
            ServiceError: it cannot be fetched.
            WireError: it belongs to another space.
        """
        found = self._bring(arm, work.base, work.deltas or [])
        kept = self._folder.bases(work.run.id)
        self._folder.forget_versions(but={work.base.sha256, work.origin.sha256, *kept})
        return found

    def divergence(self, arm: Arm, state: PersonalState, base: FloatVector) -> float | None:
        """How far the last committed step was from that of all up to ``base`` (D,), on what this
        client shares; None if the version that it started from is not here any more.
        """
        committed = arm.record.committed
        data = self._held(committed.base) if committed and committed.base else None
        if data is None:
            return None
        start = decode_version(data, space_digest=self._space.digest, dim=self._space.dim)
        shared = ~state.merge_mask.to_bool()
        return apart((state.theta - start)[shared], (base - start)[shared])

    def origin(self, arm: Arm, work: Assignment) -> FloatVector:
        """The arm's version 0, shape (D,); see :meth:`base`."""
        return self._bring(arm, work.origin, [])

    def file(self, arm: Arm, version: VersionInfo) -> bytes:
        """The bytes of a version file, for whoever keeps it elsewhere; see :meth:`base`."""
        data = self._held(version.sha256) or self._whole(arm, version)
        if file_digest(data) != version.sha256:
            raise WireError(f"version {version.number} is not the file that was promised")
        return data

    def _bring(
        self, arm: Arm, version: VersionInfo, deltas: Sequence[DeltaDownload]
    ) -> FloatVector:
        data = self._held(version.sha256)
        if data is None:
            data = self._patched(arm, version, deltas) or self._whole(arm, version)
            self._folder.keep_version(data, version.sha256)
        found = decode_version(data, space_digest=self._space.digest, dim=self._space.dim)
        self._recent = (version.sha256, data)
        return found

    def _held(self, sha256: str) -> bytes | None:
        """A version file that is here: in memory, if it was the last one, or in the folder."""
        if self._recent is not None and self._recent[0] == sha256:
            return self._recent[1]
        return self._folder.version(sha256)

    def _patched(
        self, arm: Arm, version: VersionInfo, deltas: Sequence[DeltaDownload]
    ) -> bytes | None:
        data = self._held(deltas[0].base) if deltas else None
        if data is None:
            return None
        known: str | None = deltas[0].base
        try:
            for delta in deltas:
                file = self._client.fetch(delta.download)
                arm.received(delta.download.sha256, len(file), delta=True)
                space, dim = self._space.digest, self._space.dim
                data = patch(data, file, space=space, dim=dim, digest=known)
                known = None
        except WireError:
            return None
        except ServiceError as error:
            if error.code not in {DOWNLOAD_MISMATCH, STORE_REFUSED}:
                raise
            return None
        return data if file_digest(data) == version.sha256 else None

    def _whole(self, arm: Arm, version: VersionInfo) -> bytes:
        download = self._client.download(version.id)
        if download.sha256 != version.sha256:
            raise ServiceError(
                f"version {version.number}: the download is of another file",
                code=DOWNLOAD_MISMATCH,
            )
        data = self._client.fetch(download)
        arm.received(version.sha256, len(data))
        return data
