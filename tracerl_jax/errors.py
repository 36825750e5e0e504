"""Errors a user can cause. Each message names what is wrong (file, key, row) and the remedy."""


class UserError(Exception):
    """Base class; the command line prints the message without a traceback and exits with `status`."""

    status = 2


class ConfigError(UserError):
    """A configuration key, value or combination is not usable."""


class DataError(UserError):
    """An input file or row cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or model folder is missing, damaged or does not fit."""


class UnavailableError(UserError):
    """Something that is needed does not answer, and may do so later: a restart is worthwhile."""

    status = 76


class PeerError(UnavailableError):
    """The processes of a job did not find each other: one may have died meanwhile."""


def first_line(error: BaseException) -> str:
    """Of its message; "" where it has none."""
    return (str(error).splitlines() or [""])[0]


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
