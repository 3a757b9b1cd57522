"""Average Keras checkpoints offline: exact, streaming, without TensorFlow."""

# `python -m swa_avg` imports this module while the current folder is still on the path, whose modules are
# not to run: it imports nothing. Type checkers know this name.
TYPE_CHECKING = False

__all__ = [
    "Inspection",
    "Loading",
    "Refresh",
    "RefreshReport",
    "Report",
    "SwaAvgError",
    "SwaAvgWarning",
    "SweepReport",
    "Validation",
    "Verification",
    "__version__",
    "average",
    "inspect_checkpoints",
    "refresh_batchnorm",
    "sweep",
    "verify",
]

if TYPE_CHECKING:
    from typing import Any

    from swa_avg.averaging import Report, average
    from swa_avg.batchnorm import Loading, Refresh, RefreshReport, refresh_batchnorm
    from swa_avg.errors import SwaAvgError, SwaAvgWarning
    from swa_avg.inspection import Inspection, inspect_checkpoints
    from swa_avg.sweeping import SweepReport, Validation, sweep
    from swa_avg.text import __version__
    from swa_avg.verification import Verification, verify

# `swa-avg --help` imports this package and must not wait for numpy and h5py, nor averaging for Keras.
_HOMES = {
    "Inspection": "swa_avg.inspection",
    "Loading": "swa_avg.batchnorm",
    "Refresh": "swa_avg.batchnorm",
    "RefreshReport": "swa_avg.batchnorm",
    "Report": "swa_avg.averaging",
    "SwaAvgError": "swa_avg.errors",
    "SwaAvgWarning": "swa_avg.errors",
    "SweepReport": "swa_avg.sweeping",
    "Validation": "swa_avg.sweeping",
    "Verification": "swa_avg.verification",
    "__version__": "swa_avg.text",
    "average": "swa_avg.averaging",
    "inspect_checkpoints": "swa_avg.inspection",
    "refresh_batchnorm": "swa_avg.batchnorm",
    "sweep": "swa_avg.sweeping",
    "verify": "swa_avg.verification",
}


def __getattr__(name: str) -> "Any":
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
