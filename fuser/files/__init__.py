"""Model files: opened without their weights, read one tensor at a time, written whole or not at all."""

from fuser.files.model import ModelFile, load
from fuser.files.save import Saved, check_target, save

__all__ = ["ModelFile", "Saved", "check_target", "load", "save"]
