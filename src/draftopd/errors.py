"""Errors that users can act on. Each message says what was found, what was expected and what to do."""

#: Last sentence of the messages of a command that was stopped.
CONTINUES = "What was written before is intact; the same command with the same hydra.run.dir continues."


class DraftOPDError(Exception):
    """Base of all errors that end a command with one message instead of a traceback."""


class TargetError(DraftOPDError):
    """The target cannot be loaded or used."""


class DrafterError(DraftOPDError):
    """The drafter cannot be loaded, or does not fit the target."""


class PromptError(DraftOPDError):
    """A prompt or a prompt file cannot be used."""


class BufferError(DraftOPDError):
    """The anchor buffer cannot be read or written."""


class ServerError(DraftOPDError):
    """A serving engine cannot be reached, refuses a request, or returns an unusable answer."""


class ConfigError(DraftOPDError):
    """The composed configuration has a wrong name or value."""


class FileError(DraftOPDError):
    """A file cannot be written, is damaged or has the wrong content, or another run holds its directory."""


class NumericsError(DraftOPDError):
    """A loss or gradient is not finite."""


class RanksError(DraftOPDError):
    """Another process of a distributed run has ended or does not respond."""
