"""`smolexport generate`: continue a text with an exported file or a checkpoint, on its own runtime."""

from __future__ import annotations

import sys
from typing import Any

import click

from smolexport.cli import options
from smolexport.cli.streams import print_json, say
from smolexport.text import prose


@click.command("generate", short_help="Continue a text with a file or a checkpoint.")
@click.argument("model", help="Exported file, checkpoint folder, hub id, or the word demo.")
@click.argument("prompt", help="Text to continue; - reads it from stdin.")
@click.option("--max-tokens", "-n", default=128, help="Most tokens to generate.")
@click.option("--temperature", "-t", default=0.0, help="Sampling temperature; 0: greedy.")
@click.option("--top-k", default=0, help="Keep the k best tokens; 0: all.")
@click.option("--top-p", default=1.0, help="Keep the best tokens up to this probability.")
@click.option("--min-p", default=0.0, help="Drop tokens below this fraction of the best.")
@click.option("--repetition-penalty", default=1.0, help="Penalty on tokens that occurred before; 1: none.")
@click.option("--seed", default=0, help="Seed of the random numbers.")
@click.option("--stop", multiple=True, help="Stop before this text; repeatable.")
@click.option("--context", type=options.Integer(min=1), help="Context length: most tokens of prompt and text together.")
@options.threads
@click.option("--runtime", metavar="NAME", help="Runtime to use; default: the first installed one for the format.")
@options.runtime_settings
@options.json
def command(
    model: str,
    prompt: str,
    max_tokens: int,
    stop: tuple[str, ...],
    context: int | None,
    threads: int | None,
    runtime: str | None,
    settings: dict[str, Any],
    json: bool,
    **sampling: Any,
) -> None:
    """Continue a text: the text on stdout as it is generated, speed on stderr.

    All runtimes sample in the same way, so that a seed gives the same draws on each. On a terminal control characters
    are shown as escapes; a file or pipe gets the text as it is.
    """
    from smolexport.plugins import checked_options, locate
    from smolexport.run.generate import Generation, stream
    from smolexport.run.sampling import Sampling

    draws = Sampling(**sampling)
    words = options.read_words(None) if prompt == "-" else prompt
    path, module = locate(model, runtime)
    opening: Any = {"threads": threads, "context": context, **checked_options(module.open, settings, module.NAME)}
    with module.open(path, **opening) as session:
        for event in stream(session, words, sampling=draws, max_tokens=max_tokens, stop=stop):
            if not isinstance(event, Generation):
                if not json:
                    click.echo(_shown(event.text), nl=False)
            elif json:
                speed = {key: getattr(event.timing, key) for key in ("ttft_ms", "prefill_tok_s", "decode_tok_s")}
                stop_reason = event.stop_reason.value
                facts = {"prompt": words, "text": event.text, "tokens": list(event.tokens), "stop_reason": stop_reason}
                print_json({**facts, "speed": speed})
            else:
                click.echo(_shown(event.tail))
                t = event.timing
                decode = f", decode {t.decode_tok_s:.1f} tokens/s" if t.decode_tok_s else ""
                say(
                    f"{module.NAME}: {t.prompt_tokens} + {len(event.tokens)} tokens, first after {t.ttft_ms:.0f} ms, "
                    f"prefill {t.prefill_tok_s:.1f}{decode} ({event.stop_reason.value})"
                )


def _shown(text: str) -> str:
    """`text` for stdout: unchanged for a file or pipe, without control characters for a terminal."""
    return prose(text) if sys.stdout.isatty() else text
