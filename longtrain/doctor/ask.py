"""Asking the questions of `doctor.probes`, and not waiting for ever. Imports neither torch nor anything built on it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from longtrain.doctor.probes import PROBES

NOT_ASKED = "not asked"
PATIENCE = 90.0
"""Seconds for one answer: importing torch from a cold network disk, or waking eight GPUs, takes half a minute."""


@dataclass(frozen=True)
class Answer:
    """What a question brought: facts, or the problem that kept it from being answered."""

    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def ask(folder: Path, *, patience: float = PATIENCE, command: Sequence[str] | None = None) -> dict[str, Answer]:
    """Every question's answer. folder: where runs are written. command: what answers, for tests."""
    words = list(command or (sys.executable, "-m", "longtrain.doctor.probes", str(folder)))
    answers: dict[str, Answer] = {}
    asking = next(iter(PROBES))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    lines: queue.Queue[str] = queue.Queue()
    complaints: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(stream, put), daemon=True)
        for stream, put in ((process.stdout, lines.put), (process.stderr, complaints.append))
    ]
    for reader in readers:
        reader.start()
    try:
        while line := lines.get(timeout=patience):
            said = json.loads(line)
            asking = said.get("asking", asking)
            if "name" in said:
                answers[said["name"]] = Answer(said.get("facts", {}), said.get("problem"))
    except queue.Empty:
        answers[asking] = Answer(problem=f"gave no answer within {patience:.0f} s")
    finally:
        process.kill()
    # what hangs inside the kernel outlives its kill: nobody waits for it
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    if len(answers) < len(PROBES) and asking not in answers:
        readers[1].join(1.0)
        last = next((text.strip() for text in reversed(complaints) if text.strip()), "no message")
        answers[asking] = Answer(problem=f"ended the process: {last}")
    return {name: answers.get(name, Answer(problem=f"{NOT_ASKED}, because of {asking}")) for name in PROBES}


def _read(stream: IO[str], put: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            put(line)
    put("")
