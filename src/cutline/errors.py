"""Errors for users. Each says what was wrong, the value, and what to do next; the CLI prints them without a traceback."""


class CutlineError(Exception):
    """Something the user can put right."""


class ConfigError(CutlineError):
    """A recipe, an override or an option is unknown or ill-typed."""


class DataError(CutlineError):
    """A table, a tar, a picture or a label is missing, broken or does not fit."""


class TrainingError(CutlineError):
    """A run cannot go on: too many broken pictures, a loss that is not finite, a checkpoint that does not fit."""


class DivergedError(TrainingError):
    """The loss stayed infinite or not a number."""
