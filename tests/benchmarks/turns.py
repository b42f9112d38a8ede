"""Players of a model in turns: each in a process of its own, all loaded at once, one of them computing at a time.

A prompt or a few tokens at a time and then the next player: a slow moment of the machine meets all of them, and the
ratio of two figures of the same turn says more than the ratio of two medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Feed", "Figures", "Player", "in_turns", "ratio", "serve"]

Feed = Callable[[list[int]], object]
"""Appends tokens and makes the logits of the last one at least."""
Player = tuple[Feed, Callable[[], object]]
"""`Feed`, and what makes it forget all tokens."""
Figures = Mapping[str, Sequence[float]]
"""Tokens per second by turn: `prefill` and `decode` by the clock, `prefill_cpu` and `decode_cpu` by CPU time."""
STEPS = 16  # tokens of a turn


def serve(player: Player, prompt: int, tokens: int) -> None:
    """Answer the commands of `in_turns` on stdin until it ends; run in the player's own process."""
    feed, rewind = player
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 1000, prompt + tokens)]
    feed(ids[:16])
    feed(ids[16:17])
    print("ready", flush=True)
    for line in sys.stdin:
        start = int(line)
        if start == 0:
            rewind()
        before = _clocks()
        if start == 0:
            feed(ids[:prompt])
        else:
            for i in ids[start : start + STEPS]:
                feed([i])
        print(json.dumps(list(_clocks() - before)), flush=True)


def _clocks() -> Any:
    """Seconds of the wall and of this process, [2]."""
    return np.array([time.perf_counter(), time.process_time()])


def in_turns(
    commands: Mapping[Any, Sequence[str]], prompt: int, tokens: int, repetitions: int, cwd: Path | None = None
) -> dict[Any, Figures]:
    """Start `commands`, each of which ends in `serve`, and let them compute in turns; figures under the same keys.

    Every repetition begins with another player; the first one is not counted.
    """
    pipe = subprocess.PIPE
    players = {
        key: subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=cwd)
        for key, command in commands.items()
    }
    figures: dict[Any, dict[str, list[float]]] = {
        key: {name: [] for name in ("prefill", "prefill_cpu", "decode", "decode_cpu")} for key in commands
    }
    try:
        for key, player in players.items():
            if _answer(player) != "ready":
                raise SystemExit(f"{key} does not run: {' '.join(commands[key])}")
        order = list(players)
        for turn in range(repetitions + 1):
            order.append(order.pop(0))
            for start in (0, *range(prompt, prompt + tokens - STEPS + 1, STEPS)):
                for key in order:
                    wall, cpu = _ask(players[key], start)
                    name, count = ("decode", STEPS) if start else ("prefill", prompt)
                    if turn:
                        figures[key][name].append(count / wall)
                        figures[key][f"{name}_cpu"].append(count / cpu)
    finally:
        for player in players.values():
            player.kill()
            player.wait()
    return dict(figures)


def _ask(player: subprocess.Popen[str], start: int) -> tuple[float, float]:
    assert player.stdin is not None
    player.stdin.write(f"{start}\n")
    player.stdin.flush()
    wall, cpu = json.loads(_answer(player))
    return wall, cpu


def _answer(player: subprocess.Popen[str]) -> str:
    assert player.stdout is not None
    line = player.stdout.readline()
    if not line:
        raise SystemExit(f"a player ended: {player.args}")
    return line.strip()


def ratio(figures: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios turn by turn."""
    return statistics.median(a / b for a, b in zip(figures, base, strict=True))
