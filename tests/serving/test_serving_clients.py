"""Third-party client programs against a server on the loopback interface; docs/clients.md has the
table.
"""

import asyncio
import json
import os

import pytest
from served import TOOL_TEMPLATE, ScriptedModel, engine_of, served

import loader

pytest.importorskip("fastapi")

KEY = "secret"
MESSAGES = [{"role": "user", "content": "So Jonah arose, and went to"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["ship", "fish"]},
    },
    "required": ["name", "age", "kind"],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def model(converted):
    return loader.from_pretrained(converted("2bit"))


@pytest.fixture(scope="module")
def tokenizer(converted):
    return loader.load_tokenizer(converted("2bit"))


@pytest.fixture(scope="module")
def url(model, tokenizer):
    with engine_of(model, tokenizer) as engine, served(engine, tokenizer, key=KEY) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def tool_url(model, tokenizer):
    """URL of a server that answers each prompt with a call of the tool weather."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Nineveh"}}</tool_call>'
    script = [*tokenizer(call, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with (
        engine_of(ScriptedModel(model, script), tokenizer) as engine,
        served(engine, tokenizer, key=KEY, template=TOOL_TEMPLATE) as url,
    ):
        yield f"{url}/v1"


class TestOpenai:
    @pytest.fixture
    def openai(self):
        return pytest.importorskip("openai")

    @pytest.fixture
    def client(self, openai, url):
        return openai.OpenAI(base_url=url, api_key=KEY)

    def ask(self, client, **options):
        return client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, **options
        )

    def test_models(self, client):
        assert [listed.id for listed in client.models.list()] == ["tiny"]

    def test_chat_and_stream_give_the_same_text(self, client):
        whole = self.ask(client)
        stream = list(self.ask(client, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == whole.choices[0].message.content != ""
        assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens == 6

    def test_async_requests_at_once(self, openai, client, url):
        async def all_texts():
            async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as asynchronous:
                return await asyncio.gather(*(self.ask(asynchronous) for _ in range(3)))

        texts = {answer.choices[0].message.content for answer in asyncio.run(all_texts())}
        assert texts == {self.ask(client).choices[0].message.content}

    def test_async_stream(self, openai, client, url):
        async def text():
            async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as asynchronous:
                chunks = [chunk async for chunk in await self.ask(asynchronous, stream=True)]
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        assert asyncio.run(text()) == self.ask(client).choices[0].message.content

    def test_completion(self, client):
        answer = client.completions.create(
            model="tiny", prompt="So Jonah arose, and", max_tokens=4, logprobs=2
        )
        choice = answer.choices[0]
        assert "".join(choice.logprobs.tokens) == choice.text
        assert len(choice.logprobs.top_logprobs[0]) == 2

    def test_logprobs(self, client):
        choice = self.ask(client, logprobs=True, top_logprobs=3).choices[0]
        assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
        assert all(
            len(token.top_logprobs) == 3 and token.logprob <= 0 for token in choice.logprobs.content
        )

    def test_stop_text_is_not_in_the_answer(self, client):
        text = self.ask(client).choices[0].message.content
        stopped = self.ask(client, stop=[text[5:8]]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == (
            text[: text.index(text[5:8])],
            "stop",
        )

    def test_json_schema(self, client):
        pytest.importorskip("xgrammar")
        form = {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
        }
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=1, response_format=form
        )
        value = json.loads(answer.choices[0].message.content)
        assert value.keys() == {"name", "age", "kind"}
        assert (
            len(value["name"]) <= 8
            and 0 <= value["age"] <= 99
            and value["kind"] in ("ship", "fish")
        )

    def test_json_object(self, client):
        pytest.importorskip("xgrammar")
        answer = self.ask(client, response_format={"type": "json_object"})
        choice = answer.choices[0]
        assert choice.finish_reason == "length" or isinstance(
            json.loads(choice.message.content), dict
        )
        assert choice.message.content.startswith("{")

    def test_pydantic_model(self, client):
        pytest.importorskip("xgrammar")
        pydantic = pytest.importorskip("pydantic")

        class Fish(pydantic.BaseModel):
            is_great: bool

        answer = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Fish
        )
        assert isinstance(answer.choices[0].message.parsed.is_great, bool)

    def test_tools_and_their_results(self, openai, tool_url):
        client = openai.OpenAI(base_url=tool_url, api_key=KEY)
        options = {"model": "tiny", "temperature": 0, "tools": TOOLS}
        choice = client.chat.completions.create(messages=MESSAGES, **options).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Nineveh"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        answer = client.chat.completions.create(
            messages=[*MESSAGES, choice.message.model_dump(exclude_none=True), result], **options
        )
        assert answer.usage.prompt_tokens > 0

    def test_wrong_key_and_bad_parameters_are_its_errors(self, openai, client, url):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong").models.list()
        with pytest.raises(openai.BadRequestError) as refused:
            self.ask(client, n=2)
        assert refused.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=MESSAGES)


class TestLangchain:
    @pytest.fixture
    def chat_class(self):
        return pytest.importorskip("langchain_openai").ChatOpenAI

    def test_chat_stream_and_structured_output(self, chat_class, url):
        chat = chat_class(base_url=url, api_key=KEY, model="tiny", temperature=0, max_tokens=6)
        answer = chat.invoke("So Jonah arose, and went to")
        assert answer.usage_metadata["output_tokens"] == 6
        assert (
            "".join(chunk.content for chunk in chat.stream("So Jonah arose, and went to"))
            == answer.content
        )
        pytest.importorskip("xgrammar")
        longer = chat_class(base_url=url, api_key=KEY, model="tiny", seed=1)
        value = longer.with_structured_output(
            {"title": "person", **SCHEMA}, method="json_schema"
        ).invoke("Jonah")
        assert value["kind"] in ("ship", "fish")

    def test_tools(self, chat_class, tool_url):
        chat = chat_class(base_url=tool_url, api_key=KEY, model="tiny").bind_tools(TOOLS)
        (call,) = chat.invoke("So Jonah arose, and went to").tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Nineveh"})


class TestLitellm:
    @pytest.fixture
    def litellm(self, monkeypatch):
        # It fetches a table of prices when it is imported, unless it is told to take its own.
        monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")
        return pytest.importorskip("litellm")

    def test_chat_and_stream(self, litellm, url):
        options = {
            "model": "openai/tiny",
            "api_base": url,
            "api_key": KEY,
            "max_tokens": 6,
            "temperature": 0,
        }
        whole = litellm.completion(messages=MESSAGES, **options)
        assert whole.usage.completion_tokens == 6
        chunks = litellm.completion(messages=MESSAGES, stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content

    def test_text_completion(self, litellm, url):
        answer = litellm.text_completion(
            model="text-completion-openai/tiny",
            prompt="So Jonah",
            api_base=url,
            api_key=KEY,
            max_tokens=3,
        )
        assert answer.usage.completion_tokens == 3
