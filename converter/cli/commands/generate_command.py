"""`moe-convert generate`: text from a converted model, as it comes."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.model_options import (
    ExpertsThere,
    early_tokenizer,
    load_model,
    with_model_options,
)
from converter.cli.options.sampling_options import settings_of, with_sampling_options
from converter.cli.show.console import Output, output_options
from converter.cli.show.generation_stats import live_line, stats_table, with_shares
from converter.cli.show.live_text import LiveText
from formats.errors import MoeConvertError


@click.command(
    "generate",
    epilog="""\b
Examples:
  moe-convert generate mixtral-2bit --prompt "Once upon a time" --max-new-tokens 64
  moe-convert generate mixtral-2bit --prompt - --ram-cache 6GiB --stats < question.txt
  moe-convert generate mixtral-2bit --prompt "Hello" --temperature 0.8 --seed 1
  moe-convert generate mixtral-2bit --prompt "[INST] Hello [/INST]" --raw
  moe-convert generate mixtral-2bit --prompt "Hello" --device cuda --gpu-cache 8GiB --ram-cache 16GiB
  moe-convert generate owner/mixtral-2bit --lazy --prompt "Hello"   (experts come when they are needed)""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    required=True,
    help="The user's message, or the text to continue; - reads it from stdin.",
)
@shared_options.raw
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@with_sampling_options
@with_model_options
@click.option(
    "--stats", is_flag=True, help="Show cache hits, guesses, bytes read, waits and speed on stderr."
)
@output_options(interrupted="nothing was generated yet; run the same command again")
def command(
    path: Path,
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    stats: bool,
    output: Output,
    **options: Any,
) -> None:
    """Generate text with the converted model in PATH, a folder or owner/name of a repository on the
    Hub.

    If the tokenizer has a chat template, the prompt is the user's message and the text is the
    answer; --raw turns that off. Without a template the model continues the prompt. Greedy, unless
    a sampling option is given. The text streams to stdout.

    \b
    --json prints one object: text, token_ids, finish_reason ("stop": the model ended; "length":
    --max-new-tokens did), prompt_tokens, new_tokens, seconds, first_token_s, tokens_per_s, cache.
    """
    settings = settings_of(max_new_tokens, options)
    text = _prompt(prompt)
    tokenizer = early_tokenizer(path, options["check"])

    import loader
    from loader.serving.answers.generation import Generation
    from loader.serving.prefixes.prefix_cache import PrefixCache
    from loader.serving.prompts.chat_template import has_template

    ids = _tokens(tokenizer, text, raw, path) if tokenizer else None
    there = ExpertsThere(output)
    model: Any = load_model(path, options, there)
    # What was loaded, wherever that is.
    tokenizer = tokenizer or loader.load_tokenizer(model.name_or_path, check=options["check"])
    ids = ids or _tokens(tokenizer, text, raw, Path(model.name_or_path))
    generation = Generation(model, tokenizer, ids, settings, PrefixCache(model))
    shown = LiveText(
        (lambda: live_line(generation.answer, model)) if stats and not output.quiet else None
    )
    try:
        answer = generation.run((lambda _: None) if output.as_json else shown)
    except KeyboardInterrupt:
        tokens = len(generation.answer.token_ids)
        output.interrupted = f"stopped after {tokens} new tokens; a generation does not resume"
        if tokens and not output.as_json and (raw or not has_template(tokenizer)):
            output.interrupted += ": to go on, give the prompt and the text above as --prompt"
        raise
    finally:
        if not output.as_json:
            shown.end()
    result = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "seconds": answer.seconds,
        "first_token_s": answer.first_token_s,
        "tokens_per_s": answer.tokens_per_s,
        "cache": with_shares(model.moe_stats().as_dict(), answer.seconds),
        **there.facts(),
    }
    if output.as_json:
        output.result(result, "")
    if stats:
        click.echo(stats_table(result), err=True)
    there.say()


def _prompt(prompt: str) -> str:
    """The text of --prompt; MoeConvertError if it is not UTF-8."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        # Bytes that are not UTF-8 come from the command line, and in some locales from stdin, as
        # lone surrogates.
        text.encode()
    except UnicodeError:
        where = "the prompt on stdin" if prompt == "-" else "--prompt"
        raise MoeConvertError(f"{where} is not UTF-8", "give the prompt in UTF-8") from None
    return text


def _tokens(tokenizer: Any, text: str, raw: bool, folder: Path) -> list[int]:
    """Return the prompt's tokens; MoeConvertError if there is none, or one that the model lacks."""
    import torch

    from loader.hf.loading.plain_checkpoint import vocabulary_size
    from loader.hf.loading.tokenizer import check_tokens
    from loader.serving.prompts.chat_template import prompt_ids

    ids = prompt_ids(tokenizer, text, raw=raw)
    check_tokens(torch.tensor(ids), tokenizer, vocabulary_size(folder) or sys.maxsize, "the prompt")
    return ids
