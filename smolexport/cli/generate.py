"""`smolexport generate`: continue a text with an exported file or a checkpoint, on its own runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from smolexport.cli.options import (
    Integer,
    json_option,
    parse_settings,
    print_json,
    read_words,
    runtime_options,
    say,
    threads_option,
)
from smolexport.text import prose

if TYPE_CHECKING:
    from smolexport.run.generate import Generation
    from smolexport.run.session import Session


@click.command("generate", short_help="Continue a text with a file or a checkpoint.")
@click.argument("model", help="Exported file, checkpoint folder, hub id, or the word demo.")
@click.argument("prompt", help="Text to continue; - reads it from stdin.")
@click.option("--max-tokens", "-n", default=128, help="Most tokens to generate.")
@click.option("--temperature", "-t", default=0.0, help="0 is greedy.")
@click.option("--top-k", default=0, help="Keep the k best tokens; 0: all.")
@click.option("--top-p", default=1.0, help="Keep the best tokens up to this probability.")
@click.option("--min-p", default=0.0, help="Drop tokens below this fraction of the best.")
@click.option("--repetition-penalty", default=1.0, help="1: none.")
@click.option("--seed", default=0, help="Seed of the random numbers.")
@click.option("--stop", multiple=True, help="Stop before this text; repeatable.")
@click.option("--context", type=Integer(min=1), help="Most tokens held.")
@threads_option
@click.option("--runtime", "player", metavar="NAME", help="Runtime that runs it; default: the first that is there.")
@runtime_options
@json_option
def command(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: tuple[str, ...],
    context: int | None,
    threads: int | None,
    player: str | None,
    settings: tuple[str, ...],
    json: bool,
) -> None:
    """Generate text through the common loop; the text on stdout as it comes, timing on stderr.

    On a terminal control characters are shown as escapes; a file or pipe gets the text as it is.
    """
    from smolexport.plugins import checked_options, locate
    from smolexport.run.generate import Generation, stream
    from smolexport.run.sampling import Sampling

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    words = read_words(None) if prompt == "-" else prompt
    path, runtime = locate(model, player)
    options = checked_options(runtime.open, parse_settings(settings), runtime.NAME)
    opened: Callable[..., Session] = runtime.open
    with opened(path, threads=threads, context=context, **options) as session:
        for event in stream(session, words, sampling=sampling, max_tokens=max_tokens, stop=stop):
            if not isinstance(event, Generation):
                if not json:
                    click.echo(_shown(event.text), nl=False)
                continue
            if json:
                print_json(_as_json(event, words))
                continue
            click.echo(_shown(event.tail))
            t = event.timing
            decode = f", decode {t.decode_tok_s:.1f} tokens/s" if t.decode_tok_s else ""
            say(
                f"{runtime.NAME}: {t.prompt_tokens} + {len(event.tokens)} tokens, first after {t.ttft_ms:.0f} ms, "
                f"prefill {t.prefill_tok_s:.1f}{decode} ({event.stop_reason.value})"
            )


def _shown(text: str) -> str:
    """`text` for stdout: byte for byte in a file or pipe; for a terminal without what it would obey or reorder."""
    return prose(text) if sys.stdout.isatty() else text


def _as_json(done: Generation, prompt: str) -> dict[str, object]:
    t = done.timing
    return {
        "prompt": prompt,
        "text": done.text,
        "tokens": list(done.tokens),
        "stop_reason": done.stop_reason.value,
        "speed": {"ttft_ms": t.ttft_ms, "prefill_tok_s": t.prefill_tok_s, "decode_tok_s": t.decode_tok_s},
    }
