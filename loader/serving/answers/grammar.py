"""Grammars for JSON answers, compiled by xgrammar (extra `serve`)."""

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formats.install import install_extra
from loader.serving.answers.request import RefusedError
from loader.serving.answers.schema_check import check_schema

LARGEST_SCHEMA_BYTES = 64 << 10


class Grammars:
    """Compiles grammars for one tokenizer. Thread safe."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Sequence[int]) -> None:
        """vocabulary: number of logits. end_tokens: tokens that end an answer."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = list(end_tokens)
        self._compiler: Any = None

    def json_object(self) -> Any:
        """Return the grammar of JSON objects."""
        return self._compiled(
            "type", {"type": "object", "additionalProperties": True}, strict=False
        )

    def json_schema(self, schema: Any) -> Any:
        """Return the grammar of a JSON schema. Fields that it does not name are not allowed.

        RefusedError if xgrammar cannot enforce the schema.
        """
        where = "response_format.json_schema.schema"
        if len(json.dumps(schema)) > LARGEST_SCHEMA_BYTES:
            raise RefusedError(
                f"{where} is larger than {LARGEST_SCHEMA_BYTES} bytes", "response_format"
            )
        check_schema(schema, where)
        return self._compiled(where, schema, strict=True)

    def _compiled(self, where: str, schema: Any, *, strict: bool) -> Any:
        if importlib.util.find_spec("xgrammar") is None:
            raise RefusedError(
                f"response_format: the server needs xgrammar: {install_extra('serve')}",
                "response_format",
            )
        try:
            return self._opened().compile_json_schema(
                json.dumps(schema), any_whitespace=False, strict_mode=strict
            )
        except (RuntimeError, ValueError, TypeError) as e:
            raise RefusedError(
                f"response_format: {where}: {_first_line(e)}", "response_format"
            ) from e

    def _opened(self) -> Any:
        import xgrammar

        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocabulary, stop_token_ids=self._end_tokens
            )
            self._compiler = xgrammar.GrammarCompiler(
                info, max_threads=1, cache_limit_bytes=64 << 20
            )
        return self._compiler


class GrammarMatch:
    """Position of one answer in its grammar."""

    def __init__(self, grammar: Any, vocabulary: int) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._bits = xgrammar.allocate_token_bitmask(1, vocabulary)

    @property
    def is_done(self) -> bool:
        """True if the answer is complete and no token may follow."""
        return bool(self._matcher.is_terminated())

    def mask(self, scores: Tensor) -> None:
        """Set the scores of tokens that may not follow to minus infinity, in place.

        scores: float32 [vocabulary], on the CPU.
        """
        self._matcher.fill_next_token_bitmask(self._bits)
        shifts = torch.arange(32, dtype=torch.int32)
        allowed = ((self._bits[0][:, None] >> shifts) & 1).bool().flatten()[: scores.shape[0]]
        scores.masked_fill_(~allowed, -torch.inf)

    def accept(self, token: int) -> None:
        """Advance by `token`. RuntimeError if the grammar does not allow it."""
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"token {token} does not follow the grammar")


def _first_line(error: Exception) -> str:
    """Return xgrammar's message without its timestamp and source location."""
    line = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return re.sub(r"^\[[\d:]+\] \S+: ", "", line)
