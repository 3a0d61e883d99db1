"""Turns the body of a request into a `Request` for the engine, with the model's defaults."""

from typing import Any

from loader.serving.answers.grammar import Grammars
from loader.serving.answers.request import RefusedError, Request, Sampling
from loader.serving.answers.tool_calls import MARKERS
from loader.serving.engine import Engine
from loader.serving.http.bodies import Body, ChatBody, CompletionBody
from loader.serving.prompts.request_prompts import Prompts


class RequestMaker:
    """Makes requests for one engine. Thread safe."""

    def __init__(self, engine: Engine, tokenizer: Any, template: str | None = None) -> None:
        """template: text of a chat template that replaces the tokenizer's."""
        self._max_context = engine.limits.max_context
        self._vocabulary = engine.vocabulary
        self._prompts = Prompts(tokenizer, engine.vocabulary.size, template)
        self._grammars = Grammars(
            tokenizer, engine.vocabulary.size, sorted(engine.vocabulary.end_tokens)
        )
        self._defaults = _defaults(engine.model.generation_config)

    def of_chat(self, body: ChatBody) -> Request:
        """Return the request for the next message of a chat. RefusedError."""
        tools = None if body.tool_choice == "none" else body.tools or None
        check_tools(body.tools or [])
        prompt = self._prompts.of_messages(body.messages, tools)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        markers = self._vocabulary.markers(MARKERS) if tools else frozenset()
        max_new_tokens = (
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        )
        return self._request(
            body,
            prompt,
            max_new_tokens,
            logprobs=logprobs,
            grammar=self._grammar(body),
            markers=markers,
        )

    def of_completion(self, body: CompletionBody) -> Request:
        """Return the request for a completion. RefusedError."""
        prompt = self._prompts.of_text(body.prompt)
        return self._request(
            body, prompt, body.max_tokens or 16, logprobs=body.logprobs, spaced=True
        )

    def _request(
        self, body: Body, prompt: tuple[int, ...], max_new_tokens: int | None, **options: Any
    ) -> Request:
        room = self._max_context - len(prompt)
        if room < (max_new_tokens or 1):
            asked = f" and {max_new_tokens} for the answer" if max_new_tokens else ""
            raise RefusedError(
                f"the context is {self._max_context} tokens, but the request needs {len(prompt)}"
                f" for the prompt{asked}",
                "messages" if isinstance(body, ChatBody) else "prompt",
                "context_length_exceeded",
            )
        return Request(prompt, max_new_tokens or room, self._sampling(body), body.stops, **options)

    def _sampling(self, body: Body) -> Sampling:
        given = {
            name: value
            for name in self._defaults.__dataclass_fields__
            if (value := getattr(body, name, None)) is not None
        }
        values = {**vars(self._defaults), **given, "bias": self._bias(body.logit_bias or {})}
        return Sampling(**values)

    def _bias(self, bias: dict[str, float]) -> dict[int, float]:
        for token in bias:
            if not token.isdecimal() or int(token) >= self._vocabulary.size:
                raise RefusedError(
                    f"logit_bias: {token!r} is not a token of this model", "logit_bias"
                )
        return {int(token): value for token, value in bias.items()}

    def _grammar(self, body: ChatBody) -> Any:
        form = body.response_format
        if form is None or form.type == "text":
            return None
        if body.tools and body.tool_choice != "none":
            raise RefusedError(
                "response_format: not supported together with tools", "response_format"
            )
        return (
            self._grammars.json_schema(form.json_schema.schema)
            if form.json_schema
            else self._grammars.json_object()
        )


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Raise RefusedError unless every tool is a function with a name."""
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise RefusedError(
                f"tools[{number}]: expected a tool of type function with a name", "tools"
            )


def _defaults(config: Any) -> Sampling:
    """Return the sampling of generation_config.json if it samples, else OpenAI's defaults:
    temperature 1 and no cut-off.
    """
    if not getattr(config, "do_sample", False):
        return Sampling()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return Sampling(
        **{name: value for name in names if (value := getattr(config, name, None)) is not None}
    )
