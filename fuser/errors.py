"""Errors that tell a person what was found and what to do; the CLI prints them as one line."""

from __future__ import annotations


class FuserError(Exception):
    """The base of every error raised on purpose.  `exit_code` is what the CLI ends with."""

    exit_code = 2


class InputError(FuserError):
    """Bad usage or bad input: a missing, truncated or hostile file, a wrong shape, an unknown pass."""


class PassError(FuserError):
    """A pass broke the contract: it raised, left an invalid graph, lied about a change, or does not end.

    pass_name: the pass at fault; empty when several undo each other.
    """

    exit_code = 1

    def __init__(self, message: str, pass_name: str = "") -> None:
        super().__init__(message)
        self.pass_name = pass_name


class VerificationError(FuserError):
    """The optimized model is not equivalent to the original, so no result is returned or written."""

    exit_code = 1
