"""Model files: opened without their weights, read one tensor at a time, written whole or not at all."""

from fuser.files.model import ModelFile, load
from fuser.files.save import Saved, save

__all__ = ["ModelFile", "Saved", "load", "save"]
