"""FedSelect: personalized federated learning with automatically selected personal parameters.

What an integrator writes against. Importing it loads neither torch nor the server.
"""

from fedselect.errors import FedSelectError
from fedselect.masks import Mask
from fedselect.policies import Policy, RoundPolicy, RunSettings, Training, preset, preset_run
from fedselect.serving import load_personalized
from fedselect.space import Kind, ParameterSpace, Role
from fedselect.task import Batch, Task

__all__ = [
    "Batch",
    "FedSelectError",
    "Kind",
    "Mask",
    "ParameterSpace",
    "Policy",
    "Role",
    "RoundPolicy",
    "RunSettings",
    "Task",
    "Training",
    "load_personalized",
    "preset",
    "preset_run",
]
__version__ = "0.1.0"
