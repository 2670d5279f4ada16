"""Every error the library raises on purpose; nothing else lives here.

FedSelectError
├── SpaceError            a parameter space that cannot be built or does not match
├── MaskError             a mask that does not fit its space or its policy
├── WireError             bytes that are not a valid update or version file (``code``)
├── SettingsError         run settings that contradict each other
├── LifecycleError        an event a state does not allow
├── LedgerError           a ledger that does not verify
├── BlindingError         a blinded round that cannot go on
├── TrainingError         local training produced something unusable
└── ServiceError          the coordinator refused or could not be reached (``code``, ``status``)

``code`` is stable: programs may branch on it. The text is for people.
"""

from __future__ import annotations


class FedSelectError(Exception):
    """Base of all deliberate errors; ``code`` names the reason for programs."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class SpaceError(FedSelectError):
    """A parameter space that cannot be built, or two that differ."""

    code = "space_invalid"


class MaskError(FedSelectError):
    """A mask that does not fit its space or that its policy does not allow."""

    code = "mask_invalid"


class WireError(FedSelectError):
    """Bytes that are not a valid update or version file."""

    code = "file_invalid"


class SettingsError(FedSelectError):
    """Run settings that contradict each other."""

    code = "settings_invalid"


class LifecycleError(FedSelectError):
    """An event that the present state does not allow."""

    code = "transition_refused"


class LedgerError(FedSelectError):
    """A ledger that does not verify; the text names the first bad entry."""

    code = "ledger_invalid"


class BlindingError(FedSelectError):
    """A blinded round that cannot go on, or must not."""

    code = "blinding_failed"


class TrainingError(FedSelectError):
    """Local training produced something that must not be uploaded."""

    code = "training_failed"


class ServiceError(FedSelectError):
    """The coordinator refused a call or could not be reached.

    ``status`` is the HTTP status, 0 when no answer came.
    """

    code = "service_error"

    def __init__(self, message: str, *, code: str | None = None, status: int = 0) -> None:
        super().__init__(message, code=code)
        self.status = status
