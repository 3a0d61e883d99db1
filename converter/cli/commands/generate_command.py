"""`moe-convert generate`: generates text and streams it to stdout."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.model_options import with_model_options
from converter.cli.options.sampling_options import settings_of, with_sampling_options
from converter.cli.show.console import Output, output_options
from converter.cli.show.generation_stats import live_line, stats_table, with_shares
from converter.cli.show.live_text import LiveText
from converter.cli.show.tables import folded
from converter.cli.steps.model_loading import early_tokenizer, load_model
from formats.errors import MoeConvertError


@click.command(
    "generate",
    epilog="""\b
Examples:
  moe-convert generate mixtral-2bit --prompt "Once upon a time"
  moe-convert generate mixtral-2bit --prompt - --stats < question.txt
  moe-convert generate mixtral-2bit --prompt "Hi" --temperature 0.8 --seed 1
  moe-convert generate mixtral-2bit --prompt "[INST] Hello [/INST]" --raw
  moe-convert generate mixtral-2bit --prompt "Hi" --ram-cache 6GiB
  moe-convert generate owner/mixtral-2bit --lazy --prompt "Hello"
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    required=True,
    metavar="TEXT",
    help="The user's message, or the text to continue. - reads it from stdin.",
)
@shared_options.raw
@shared_options.max_new_tokens(128)
@with_sampling_options
@with_model_options
@click.option(
    "--stats",
    is_flag=True,
    help="Print cache hits, prefetches, bytes read, waiting time and speed to stderr.",
)
@output_options(interrupted="nothing was generated; run the same command again")
def command(
    path: Path,
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    stats: bool,
    output: Output,
    **options: Any,
) -> None:
    """Generate text with the converted model PATH and stream it to stdout.

    PATH is a folder, or owner/name of a repository on the Hub. If the tokenizer has a chat
    template, the prompt is the user's message and the text is the answer; --raw turns this off.
    Without a template the model continues the prompt. Decoding is greedy unless a sampling option
    is given.

    --json prints one object with the fields text, token_ids, finish_reason, prompt_tokens,
    new_tokens, seconds, first_token_s, tokens_per_s and cache. finish_reason is "stop" if the
    model ended the text, "length" if --max-new-tokens did.
    """
    settings = settings_of(max_new_tokens, options)
    text = _prompt(prompt)
    tokenizer = early_tokenizer(path, options["check"])

    from loader.serving.answers.generation import Generation
    from loader.serving.prefixes.prefix_cache import PrefixCache
    from loader.serving.prompts.chat_template import has_template

    ids = _tokens(tokenizer, text, raw, path) if tokenizer else None
    loaded = load_model(path, options, output, tokenizer)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = ids or _tokens(tokenizer, text, raw, Path(model.name_or_path))
    generation = Generation(model, tokenizer, ids, settings, PrefixCache(model))
    shown = LiveText(
        (lambda: live_line(generation.answer, model)) if stats and not output.quiet else None
    )
    try:
        answer = generation.run((lambda _: None) if output.as_json else shown)
    except KeyboardInterrupt:
        tokens = generation.answer.new_tokens
        output.interrupted = f"stopped after {tokens} new tokens; a generation cannot be resumed"
        if tokens and not output.as_json and (raw or not has_template(tokenizer)):
            output.interrupted += "; to continue, pass the prompt and the text above as --prompt"
        raise
    finally:
        if not output.as_json:
            shown.end()
    result = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "seconds": answer.seconds,
        "first_token_s": answer.first_token_s,
        "tokens_per_s": answer.tokens_per_s,
        "cache": with_shares(model.moe_stats().as_dict(), answer.seconds),
        **loaded.experts.facts(),
    }
    if output.as_json:
        output.result(result, "")
    if stats:
        click.echo(folded(stats_table(result)), err=True)
    loaded.experts.report()


def _prompt(prompt: str) -> str:
    """Return the text of --prompt. MoeConvertError if it is not UTF-8."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        # Python turns bytes that are not UTF-8 into lone surrogates, which cannot be encoded.
        text.encode()
    except UnicodeError:
        where = "the prompt on stdin" if prompt == "-" else "--prompt"
        raise MoeConvertError(f"{where} is not UTF-8", "encode the prompt as UTF-8") from None
    return text


def _tokens(tokenizer: Any, text: str, raw: bool, folder: Path) -> list[int]:
    """Return the prompt's tokens. MoeConvertError if it has none, or one beyond the embeddings."""
    import torch

    from loader.hf.loading.plain_checkpoint import vocabulary_size
    from loader.hf.loading.tokenizer import check_tokens
    from loader.serving.prompts.chat_template import prompt_ids

    ids = prompt_ids(tokenizer, text, raw=raw)
    check_tokens(torch.tensor(ids), tokenizer, vocabulary_size(folder) or sys.maxsize, "the prompt")
    return ids
