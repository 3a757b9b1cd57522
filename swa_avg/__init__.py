"""Average Keras checkpoints offline: exact, streaming, without TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Report", "SwaAvgError", "__version__", "average"]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swa_avg.errors import SwaAvgError
    from swa_avg.run import Report, average


def __getattr__(name: str) -> Any:
    # `swa-avg --help` imports this package and must not wait for numpy and h5py.
    if name in ("average", "Report"):
        from swa_avg import run

        return getattr(run, name)
    if name == "SwaAvgError":
        from swa_avg.errors import SwaAvgError

        return SwaAvgError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
