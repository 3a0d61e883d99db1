"""The errors that moe-convert raises on bad input. One base class; the next step is a field."""


class MoeConvertError(Exception):
    """What was found, where, what was expected; `hint` says what to do next, as a command where one
    exists.

    `exit_code` is what the command line returns (docs/commands.md); `default_hint` stands in where
    no hint is given.
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
    """A converted folder that breaks docs/format.md: nothing of it is used."""

    exit_code = 3
    default_hint = "get it again from where it was published, or convert again"


class DamageError(FormatError):
    """Bytes that differ from what the index says: a cut file, a wrong hash, a file that is missing."""


class VersionError(FormatError):
    """A format version that this release does not read."""

    exit_code = 1


class NotConvertedError(MoeConvertError):
    """A folder that holds no complete conversion, where one is needed; nothing in it is damaged."""


class PathError(MoeConvertError):
    """A file name that is unsafe, or a file that is not a regular file inside its folder."""

    default_hint = "get the folder again from where it was published"


class SourceError(MoeConvertError):
    """A source checkpoint that cannot be converted as it is."""


class TokenizerError(MoeConvertError):
    """A tokenizer that is missing, damaged, or needs code or packages that are not there."""


class RecipeError(MoeConvertError):
    """A recipe or option that names something that does not exist."""

    exit_code = 2


class OutputError(MoeConvertError):
    """An output folder that is not ours, is in use, or holds another conversion."""


class HubError(MoeConvertError):
    """A Hub that does not give what was asked for, or a line to it that stays broken."""

    default_hint = "try again; what was fetched before is kept"


class DoesNotFitError(MoeConvertError):
    """Not enough disk or memory; the message has both numbers."""

    exit_code = 4
