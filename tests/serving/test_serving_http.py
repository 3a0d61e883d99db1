"""The routes over HTTP on the loopback interface: parameters, limits, access, disconnects."""

import json
import socket

import pytest
from served import TOOL_TEMPLATE, PausedModel, ScriptedModel, engine_of, served

import loader
from loader.serving.engine import Limits

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

MESSAGES = [{"role": "user", "content": "So Jonah arose, and went to"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
TEXT = {"model": "tiny", "prompt": "So Jonah arose, and went to", "max_tokens": 4, "temperature": 0}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def model(converted):
    return loader.from_pretrained(converted("2bit"))


@pytest.fixture(scope="module")
def tokenizer(converted):
    return loader.load_tokenizer(converted("2bit"))


@pytest.fixture(scope="module")
def client(model, tokenizer):
    """A client of a server without a key, whose template has a place for tools."""
    with (
        engine_of(model, tokenizer) as engine,
        served(engine, tokenizer, template=TOOL_TEMPLATE) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def lines(response):
    """Return the values of a stream's events, and True if the stream ends with [DONE]."""
    texts = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(text) for text in texts if text != "[DONE]"], texts[-1] == "[DONE]"


def error(response):
    return response.json()["error"]


def test_models_are_listed(client):
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"], listed["max_model_len"]) == ("tiny", "model", 512)
    assert client.get("/v1/models/tiny").json() == listed
    assert client.get("/v1/models/other").status_code == 404
    assert client.post("/v1/chat/completions", json={**CHAT, "model": "other"}).status_code == 404


def test_streamed_text_is_the_whole_text(client):
    for route, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        whole = client.post(route, json=body).json()
        streamed, is_ended = lines(client.post(route, json={**body, "stream": True}))
        choices = [chunk["choices"][0] for chunk in streamed]
        text = "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
        )
        choice = whole["choices"][0]
        assert text == choice.get("text", choice.get("message", {}).get("content"))
        assert choices[-1]["finish_reason"] == choice["finish_reason"] == "length"
        assert is_ended and len(streamed) >= 4
        assert whole["usage"]["completion_tokens"] == 4
        assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 4


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = lines(client.post("/v1/chat/completions", json=body))[0]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all("usage" not in chunk for chunk in chunks)


def test_text_goes_on_with_the_space_that_the_prompt_lacks(client):
    text = client.post("/v1/completions", json=TEXT).json()["choices"][0]["text"]
    assert text.startswith(" ")


def test_prompt_may_be_tokens(client, tokenizer):
    tokens = tokenizer(TEXT["prompt"])["input_ids"]
    answers = [
        client.post("/v1/completions", json={**TEXT, "prompt": prompt})
        for prompt in (tokens, [tokens])
    ]
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {
        client.post("/v1/completions", json=TEXT).json()["choices"][0]["text"]
    }


def test_developer_messages_are_system_messages_and_parts_are_joined(client):
    plain = [{"role": "system", "content": "Be\nbrief."}, *MESSAGES]
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    other = [{"role": "developer", "content": parts}, *MESSAGES]
    usages = [
        client.post("/v1/chat/completions", json={**CHAT, "messages": m}).json()["usage"]
        for m in (plain, other)
    ]
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"]


REFUSED_BY_BOTH = [
    ("n", 2),
    ("best_of", 3),
    ("temperature", 2.5),
    ("temperature", -1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -1),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("max_tokens", 0),
    ("max_tokens", "a"),
    ("max_tokens", 1000),
    ("seed", "x"),
    ("seed", 1.5),
    ("seed", 2**70),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [str(i) for i in range(17)]),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"999999": 1}),
    ("logit_bias", {"5": 101}),
    ("num_beams", 2),
    ("use_beam_search", True),
    ("assistant_model", "x"),
    ("service_tier", "flex"),
    ("metadata", {"a": "b"}),
    ("store", True),
    ("frobnicate", None),
    ("user", 5),
    ("model", None),
    ("suffix", "x"),
]
REFUSED_CHATS = [
    ("messages", []),
    ("messages", "hello"),
    ("messages", [{"role": "robot", "content": "a"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": "a", "audio": {"id": "x"}}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
    ("messages", [{"role": ["user"], "content": ""}]),
    ("logprobs", 3),
    ("top_logprobs", 2),
    ("max_completion_tokens", 0),
    ("functions", []),
    ("function_call", "auto"),
    ("audio", {}),
    ("modalities", ["audio"]),
    ("prediction", {}),
    ("reasoning_effort", "low"),
    ("parallel_tool_calls", False),
    ("web_search_options", {}),
    ("verbosity", "low"),
    ("tool_choice", "auto"),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "custom", "function": {"name": "x"}}]),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("chat_template_kwargs", {"a": 1}),
    ("echo", False),
    ("prompt", "a"),
]
REFUSED_TEXTS = [
    ("prompt", None),
    ("prompt", []),
    ("prompt", ["a", "b"]),
    ("prompt", [[1], [2]]),
    ("prompt", [5, "a"]),
    ("prompt", [10**6]),
    ("prompt", [-1]),
    ("logprobs", 6),
    ("logprobs", True),
    ("echo", True),
    ("max_completion_tokens", 3),
    ("tools", []),
    ("response_format", {"type": "json_object"}),
    ("messages", MESSAGES),
]


@pytest.mark.parametrize(
    ("route", "body", "name", "value"),
    [
        *(("/v1/chat/completions", CHAT, *case) for case in REFUSED_BY_BOTH + REFUSED_CHATS),
        *(("/v1/completions", TEXT, *case) for case in REFUSED_BY_BOTH + REFUSED_TEXTS),
    ],
)
def test_parameter_that_is_wrong_or_not_supported_is_named(client, route, body, name, value):
    data = json.dumps({**body, name: value})
    response = client.post(route, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    named = error(response)
    where = {"max_tokens": {"messages", "prompt", "max_tokens"}}.get(name, {name})
    assert named["param"] in where or name in named["message"]
    assert (name in named["message"] or named["param"] in where) and named[
        "type"
    ] == "invalid_request_error"


@pytest.mark.parametrize(
    "options", [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}]
)
def test_tools_with_what_they_do_not_go_with_are_refused(client, options):
    response = client.post("/v1/chat/completions", json={**CHAT, "tools": [TOOL], **options})
    assert (response.status_code, error(response)["param"]) == (400, next(iter(options)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"not": {}},
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"$ref": "#/$defs/nowhere"},
        {"type": "string", "enum": ["x" * 70000]},
    ],
)
def test_schema_that_no_grammar_keeps_is_refused(client, schema):
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = client.post("/v1/chat/completions", json={**CHAT, "response_format": form})
    assert (response.status_code, error(response)["param"]) == (400, "response_format")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"model": "\\ud800"}'],
)
def test_bodies_that_are_no_request_are_refused(client, data):
    response = client.post(
        "/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400


def test_bodies_of_other_types_and_huge_ones_are_refused(client):
    data = json.dumps(CHAT).encode()
    assert (
        client.post(
            "/v1/chat/completions", content=data, headers={"Content-Type": "text/plain"}
        ).status_code
        == 415
    )
    huge = client.post(
        "/v1/chat/completions",
        content=b" " * (17 << 20),
        headers={"Content-Type": "application/json"},
    )
    assert huge.status_code == 413


def test_null_is_not_given_and_user_is_accepted(client):
    nulls = dict.fromkeys(
        ("top_p", "stop", "seed", "n", "logprobs", "tools", "response_format", "stream")
    )
    response = client.post("/v1/chat/completions", json={**CHAT, **nulls, "user": "me", "n": 1})
    assert response.status_code == 200


def test_context_that_is_too_long_is_refused(client):
    long = [{"role": "user", "content": "word " * 600}]
    response = client.post("/v1/chat/completions", json={**CHAT, "messages": long})
    assert response.status_code == 400
    assert (
        error(response)["code"] == "context_length_exceeded" and "512" in error(response)["message"]
    )


def test_template_that_refuses_a_message_is_quoted(model, tokenizer):
    template = "{{ raise_exception('no system messages') }}"
    with engine_of(model, tokenizer) as engine, served(engine, tokenizer, template=template) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert response.status_code == 400 and "no system messages" in error(response)["message"]


def test_model_without_a_template_completes_texts_only(model, tokenizer):
    with engine_of(model, tokenizer) as engine, served(engine, tokenizer, template=None) as url:
        chat = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert httpx.post(f"{url}/v1/completions", json=TEXT, timeout=60).status_code == 200
    assert chat.status_code == 400 and "--template" in error(chat)["message"]


def test_all_routes_but_health_need_the_key(model, tokenizer):
    with engine_of(model, tokenizer) as engine, served(engine, tokenizer, key="secret") as url:
        for route in ("/v1/models", "/metrics", "/v1/models/tiny"):
            assert httpx.get(url + route).status_code == 401
            assert (
                httpx.get(url + route, headers={"Authorization": "Bearer wrong"}).status_code == 401
            )
            assert (
                httpx.get(url + route, headers={"Authorization": "Bearer secret"}).status_code
                == 200
            )
        refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, error(refused)["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_without_a_key_requests_by_other_names_are_refused(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 401
    assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_only_named_origins_may_ask(model, tokenizer):
    origin = "http://localhost:3000"
    with engine_of(model, tokenizer) as engine, served(engine, tokenizer, cors=(origin,)) as url:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        allowed = httpx.options(f"{url}/v1/chat/completions", headers={"Origin": origin, **asked})
        assert allowed.headers["access-control-allow-origin"] == origin
        other = httpx.options(
            f"{url}/v1/chat/completions", headers={"Origin": "http://evil.example", **asked}
        )
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_full_queue_is_429_with_retry_after(model, tokenizer):
    paused = PausedModel(model)
    with (
        engine_of(paused, tokenizer, Limits(512, max_queue=0)) as engine,
        served(engine, tokenizer) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        paused.pause()
        with client.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "stream": True}
        ) as running:
            paused.wait_for_pass()
            refused = client.post("/v1/chat/completions", json=CHAT)
            paused.resume()
            running.read()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert "moe_convert_requests_refused_queue_full_total 1\n" in client.get("/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_the_model(model, tokenizer, stream):
    paused = PausedModel(model)
    data = json.dumps({**CHAT, "max_tokens": 400, "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
    )
    with engine_of(paused, tokenizer) as engine, served(engine, tokenizer) as url:
        address = url.removeprefix("http://").split(":")
        paused.pause()
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            paused.wait_for_pass()
        with httpx.Client(base_url=url, timeout=60) as client:
            # The server sees the end of the first connection before it answers on another one.
            client.get("/health")
            client.get("/health")
            paused.resume()
            client.post("/v1/chat/completions", json=CHAT)
            assert engine.metrics.value("generations_cancelled") == 1
            assert engine.metrics.value("generated_tokens") < 50
            assert ('status="499"' in client.get("/metrics").text) is not stream


def test_client_that_goes_away_before_its_request_is_whole_is_no_error(model, tokenizer, caplog):
    with engine_of(model, tokenizer) as engine, served(engine, tokenizer) as url:
        address = url.removeprefix("http://").split(":")
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        with httpx.Client(base_url=url, timeout=60) as client:
            client.get("/health")
            client.get("/health")
            assert 'status="499"' in client.get("/metrics").text
    assert not caplog.records


def test_failed_generation_is_a_500_or_an_event_of_the_stream(model, tokenizer):
    class Failing(PausedModel):
        def __call__(self, **arguments):
            raise OSError("the disk is gone")

    with engine_of(Failing(model), tokenizer) as engine, served(engine, tokenizer) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 500
        events, is_ended = lines(
            httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
        )
        assert "the disk is gone" in events[-1]["error"]["message"] and not is_ended


CALL = '{"name": "weather", "arguments": {"city": "Nineveh"}}'


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (f"[TOOL_CALLS] [{CALL}]", ""),
        (f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. "),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_calls_of_tools_are_parsed(model, tokenizer, answer, text, stream):
    script = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    body = {**CHAT, "tools": [TOOL], "max_tokens": 200, "stream": stream}
    with (
        engine_of(ScriptedModel(model, script), tokenizer) as engine,
        served(engine, tokenizer, template=TOOL_TEMPLATE) as url,
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    if stream:
        choices = [event["choices"][0] for event in lines(response)[0]]
        deltas = [choice["delta"] for choice in choices]
        content = "".join(delta.get("content", "") for delta in deltas)
        (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        reason = choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        content, calls = choice["message"]["content"] or "", choice["message"]["tool_calls"]
        reason = choice["finish_reason"]
    assert content == text and reason == "tool_calls"
    assert calls[0]["function"]["name"] == "weather"
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Nineveh"}


@pytest.mark.parametrize(
    "answer", ["[TOOL_CALLS] [broken", '<tool_call>{"name": "other"}</tool_call>', "a [TOOL_CALL"]
)
def test_text_that_is_no_call_of_a_known_tool_stays_text(model, tokenizer, answer):
    script = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    body = {**CHAT, "tools": [TOOL], "max_tokens": 200}
    with (
        engine_of(ScriptedModel(model, script), tokenizer) as engine,
        served(engine, tokenizer, template=TOOL_TEMPLATE) as url,
    ):
        choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][
            0
        ]
    assert choice["message"]["content"] == answer and choice["finish_reason"] == "stop"


def test_metrics_count_tokens_and_experts(client):
    def values():
        rows = [
            line.rsplit(" ", 1)
            for line in client.get("/metrics").text.splitlines()
            if line[0] != "#"
        ]
        return {name.removeprefix("moe_convert_"): float(value) for name, value in rows}

    before = values()
    client.post("/v1/completions", json=TEXT)
    after = values()
    assert after["generated_tokens_total"] == before["generated_tokens_total"] + 4
    assert after["generations_total"] == before["generations_total"] + 1
    route = 'http_responses_total{route="/v1/completions",status="200"}'
    assert after[route] == before.get(route, 0) + 1
    assert after["expert_cache_hits_total"] > before["expert_cache_hits_total"]
    assert 0 < after["expert_cache_hit_ratio"] <= 1
    assert after["queue_length"] == after["generations_running"] == 0
