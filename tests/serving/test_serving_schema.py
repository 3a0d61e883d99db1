import pytest

from loader.serving.answers.request import RefusedError
from loader.serving.answers.schema_check import check_schema

KEPT = [
    {},
    True,
    {"type": "string", "maxLength": 3, "title": "t"},
    {"type": ["integer", "null"], "minimum": 5},
    {"type": "string", "format": "date"},
    {"type": "string", "pattern": "^a+$"},
    {"enum": [1, "a", None]},
    {"type": "integer", "enum": [1, 2]},
    {"const": {"a": 1}},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"allOf": [{"$ref": "#/$defs/a"}], "description": "d", "$defs": {"a": {"type": "string"}}},
    {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string"}], "items": False},
    {
        "type": "object",
        "properties": {"not": {"type": "integer"}},
        "required": ["not"],
        "additionalProperties": False,
    },
]
NOT_KEPT = [
    ({"not": {}}, "S.not"),
    ({"type": "integer", "multipleOf": 5}, "S.multipleOf"),
    ({"minimum": 5}, "S.minimum"),
    ({"type": "array", "uniqueItems": True}, "S.uniqueItems"),
    ({"type": "string", "format": "frob"}, "S.format"),
    ({"type": "string", "pattern": "a", "maxLength": 2}, "S"),
    ({"oneOf": [{}]}, "S.oneOf"),
    ({"type": "string", "pattern": "(?=a)b"}, "S.pattern"),
    ({"type": "string", "pattern": r"\bb"}, "S.pattern"),
    ({"allOf": [{"type": "string"}, {"maxLength": 1}]}, "S.allOf"),
    ({"frobKeyword": 5}, "S.frobKeyword"),
    ({"type": "object", "properties": {}, "anyOf": [{}]}, "S.properties"),
    ({"type": "integer", "enum": ["a"]}, "S.enum"),
    ({"type": "integer", "enum": [True]}, "S.enum"),
    ({"type": "object", "required": ["z"]}, "S.required"),
    ({"$ref": "#/a", "type": "string"}, "S.type"),
    ({"type": "integer", "enum": [1], "minimum": 2}, "S.minimum"),
    ({"type": "object", "properties": {"a": {"contains": {}}}}, "S.properties.a.contains"),
    ({"type": "any"}, "S.type"),
    ({"$defs": {"a": {"if": {}}}}, "S.$defs.a.if"),
    ({"type": [["string"]]}, "S.type"),
    (5, "S"),
    (False, "S"),
    ({"type": "object", "properties": [1]}, "S.properties"),
    ({"anyOf": []}, "S.anyOf"),
    ({"type": []}, "S.type"),
]


@pytest.mark.parametrize("schema", KEPT)
def test_schema_that_a_grammar_keeps_is_taken(schema):
    check_schema(schema, "S")


@pytest.mark.parametrize(("schema", "place"), NOT_KEPT)
def test_schema_that_a_grammar_does_not_keep_is_refused_by_its_place(schema, place):
    with pytest.raises(RefusedError) as refused:
        check_schema(schema, "S")
    assert refused.value.message.startswith(f"{place}: ")
    assert refused.value.parameter == "response_format"


def test_schema_of_too_many_levels_is_refused():
    schema = {"type": "string"}
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RefusedError, match="levels"):
        check_schema(schema, "S")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": ["string", "null"], "maxLength": 1}, '"aa"'),
        ({"type": "integer", "minimum": -3}, "-4"),
        ({"type": "number", "minimum": 3.5, "maximum": 3.9}, "3.95"),
        ({"enum": ["a"]}, '"b"'),
        ({"type": "string", "format": "date"}, '"xx"'),
        ({"type": "string", "pattern": "^a+$"}, '"b"'),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "true"),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, "[1, 2]"),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "{}"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, '{"b": 1}'),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, '"a"'),
    ],
)
def test_xgrammar_keeps_what_is_taken(schema, text, converted):
    pytest.importorskip("xgrammar")
    import loader
    from loader.serving.answers.grammar import GrammarMatch, Grammars

    tokenizer = loader.load_tokenizer(converted("2bit"))
    match = GrammarMatch(
        Grammars(tokenizer, 4096, [tokenizer.eos_token_id]).json_schema(schema), 4096
    )
    with pytest.raises(RuntimeError, match="does not follow"):
        for token in [
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]:
            match.accept(token)
