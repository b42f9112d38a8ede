"""`smolexport generate`: continue a text with an exported file or a checkpoint, on its own runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from smolexport.cli.options import Json, RuntimeOptions, Threads, parse_settings, print_json, read_words, say

if TYPE_CHECKING:
    from smolexport.generation import Generation
    from smolexport.runtime import Session

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="Exported file, checkpoint folder, hub id, or the word demo.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k best tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the best tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens below this fraction of the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="1: none.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random numbers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text; repeatable.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Most tokens held.")] = None,
    threads: Threads = None,
    player: Annotated[
        str | None, typer.Option("--runtime", help="Runtime that plays it; default: the first that is there.")
    ] = None,
    settings: RuntimeOptions = None,
    json: Json = False,
) -> None:
    """Generate text through the common loop; the text on stdout as it comes, timing on stderr."""
    from smolexport.generation import Generation, Sampling, stream
    from smolexport.plugins import checked_options, locate

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    words = read_words(None) if prompt == "-" else prompt
    path, runtime = locate(model, player)
    options = checked_options(runtime.open, parse_settings(settings), runtime.NAME)
    opened: Callable[..., Session] = runtime.open
    with opened(path, threads=threads, context=context, **options) as session:
        for event in stream(session, words, sampling=sampling, max_tokens=max_tokens, stop=tuple(stop or ())):
            if not isinstance(event, Generation):
                if not json:
                    typer.echo(event.text, nl=False)
                continue
            if json:
                print_json(_as_json(event, words))
                continue
            typer.echo(event.tail)
            t = event.timing
            decode = f", decode {t.decode_tok_s:.1f} tokens/s" if t.decode_tok_s else ""
            say(
                f"{runtime.NAME}: {t.prompt_tokens} + {len(event.tokens)} tokens, first after {t.ttft_ms:.0f} ms, "
                f"prefill {t.prefill_tok_s:.1f}{decode} ({event.stop_reason.value})"
            )


def _as_json(done: Generation, prompt: str) -> dict[str, object]:
    t = done.timing
    return {
        "prompt": prompt,
        "text": done.text,
        "tokens": list(done.tokens),
        "stop_reason": done.stop_reason.value,
        "speed": {"ttft_ms": t.ttft_ms, "prefill_tok_s": t.prefill_tok_s, "decode_tok_s": t.decode_tok_s},
    }
