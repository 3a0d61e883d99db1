"""The errors that moe-convert raises on bad input. One base class; the next step is a field."""


class MoeConvertError(Exception):
    """Base class. The message names the problem, the place and the expected value.

    `hint` is the next step, as a command where one exists. `exit_code` is the exit status of the
    command line (docs/commands.md). `default_hint` is the hint of an error raised without one.
    """

    exit_code = 1
    default_hint = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.hint}" if self.hint else self.message


class FormatError(MoeConvertError):
    """A converted folder violates docs/format.md. Nothing of it is used."""

    exit_code = 3
    default_hint = "get it again from where it was published, or convert again"


class DamageError(FormatError):
    """Bytes differ from the index: a truncated file, a wrong hash, a missing file."""


class VersionError(FormatError):
    """This release does not read the folder's format version."""

    exit_code = 1


class NotConvertedError(MoeConvertError):
    """The folder holds no complete conversion; nothing in it is damaged."""


class PathError(MoeConvertError):
    """A file name is unsafe, or the file is not a regular file inside its folder."""

    default_hint = "get the folder again from where it was published"


class SourceError(MoeConvertError):
    """The source checkpoint cannot be converted in its present state."""


class TokenizerError(MoeConvertError):
    """The tokenizer is missing or damaged, or needs its own code or packages not installed."""


class RecipeError(MoeConvertError):
    """A recipe or option has an unknown name or an invalid value."""

    exit_code = 2


class OutputError(MoeConvertError):
    """The output folder is not ours, is in use, or holds another conversion."""


class HubError(MoeConvertError):
    """The Hub refuses or lacks the requested file, or the connection fails repeatedly."""

    default_hint = "try again; what was fetched before is kept"


class DoesNotFitError(MoeConvertError):
    """Not enough disk or memory. The message gives the needed and the available size."""

    exit_code = 4
