"""Proof: is the optimized model the same function as the original, to within rounding?"""

from fuser.proof.check import verify
from fuser.proof.verification import Verification

__all__ = ["Verification", "verify"]
