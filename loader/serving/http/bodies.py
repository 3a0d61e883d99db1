"""Bodies of requests, checked by msgspec. Every field is obeyed, or the request is refused by name.

A null field counts as not given. Fields of OpenAI's API that this server does not support are
absent here, and therefore refused.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

from msgspec import DecodeError, Meta, Struct, ValidationError
from msgspec.json import Decoder

from loader.serving.answers.request import RefusedError

LARGEST_BODY_BYTES = 16 << 20
MAX_STOPS = 16

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Text = Annotated[str, Meta(min_length=1)]
Stops = Text | Annotated[list[Text], Meta(max_length=MAX_STOPS)]
Whole = Annotated[int, Meta(ge=1)]


class StreamOptions(Struct, forbid_unknown_fields=True, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool = False


class _Common(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Fields of both kinds of request.

    top_k, min_p and repetition_penalty are not OpenAI's, but common in other servers. user: a name
    for the log.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops | None = None
    n: Literal[1] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """True if the last chunk of a stream must hold the usage object."""
        return self.stream_options is not None and self.stream_options.include_usage


class JsonSchema(Struct, forbid_unknown_fields=True, frozen=True):
    """A named schema. Answers always follow it; `strict` is accepted and has no effect."""

    name: str
    schema: dict[str, Any]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True, frozen=True):
    """Format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(_Common, frozen=True, kw_only=True):
    """A request for the next message of a chat."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None


class CompletionBody(_Common, frozen=True, kw_only=True):
    """A request for the text after a prompt: a text, or tokens."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Literal[1] | None = None
    echo: bool = False
    """True is refused."""


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """Return the body of a request. RefusedError names a wrong or unsupported parameter."""
    if len(data) > LARGEST_BODY_BYTES:
        raise RefusedError(f"the request is larger than {LARGEST_BODY_BYTES} bytes")
    try:
        body = Decoder(kind).decode(data)
    except ValidationError as e:
        raise _refusal(str(e)) from None
    except (DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RefusedError(f"the request is not JSON: {e}") from None
    if body.stream_options is not None and not body.stream:
        raise RefusedError("stream_options needs stream: true", "stream_options")
    if isinstance(body, ChatBody):
        _check_chat(body)
    elif body.echo:
        raise RefusedError("echo: true is not supported", "echo")
    return body


def _check_chat(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RefusedError("top_logprobs needs logprobs: true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RefusedError("give max_completion_tokens or max_tokens, not both", "max_tokens")
    if body.tool_choice is not None and not body.tools:
        raise RefusedError("tool_choice needs tools", "tool_choice")
    form = body.response_format
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        raise RefusedError(
            "response_format: the field json_schema and the type json_schema need each other",
            "response_format",
        )


def _refusal(message: str) -> RefusedError:
    """Turn a message of msgspec into a RefusedError."""
    path = re.search(r" - at `\$\.?(.*)`$", message)
    where = path.group(1) if path else ""
    what = message[: path.start()] if path else message
    if field := re.search(r"unknown field `(.*)`", what):
        name = f"{where}.{field.group(1)}" if where else field.group(1)
        return RefusedError(
            f"{name}: this server does not support this parameter", name, "unsupported_parameter"
        )
    if field := re.search(r"missing required field `(.*)`", what):
        name = f"{where}.{field.group(1)}" if where else field.group(1)
        return RefusedError(f"{name}: missing", name, "missing_required_parameter")
    name = re.split(r"[.\[]", where)[0] or None
    return RefusedError(
        f"{where or 'the request'}: {what[0].lower()}{what[1:]}", name, "invalid_value"
    )
