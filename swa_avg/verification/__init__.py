"""Derive outputs again from the inputs that they name, and compare. Importing this imports no Keras."""

from swa_avg.verification.result import Verification
from swa_avg.verification.story import verify

__all__ = ["Verification", "verify"]
