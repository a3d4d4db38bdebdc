"""The findings as text for people and as JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from longtrain.doctor.ask import Answer, ask
from longtrain.doctor.judge import Finding, Level, judge, worst

VERDICTS = {
    Level.OK: "nothing stands against training here",
    Level.NOTE: "nothing stands against training here",
    Level.WARNING: "training runs here, but see the warnings",
    Level.BROKEN: "training will fail here: see what is broken",
}


def examine(folder: Path, as_json: bool) -> tuple[str, int]:
    """What to print about this machine, and the exit code. folder: where runs are written."""
    answers = ask(folder)
    findings = judge(answers)
    text = to_json(findings, answers) if as_json else "\n".join(to_text(findings))
    return text, worst(findings).exit_code


def to_text(findings: Sequence[Finding]) -> list[str]:
    """A line a finding, its advice below it, and a verdict."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.name.lower():8} {finding.what:14} {finding.text}")
        if finding.advice is not None:
            lines.append(f"{'':8} {'':14} -> {finding.advice}")
    return [*lines, "", VERDICTS[worst(findings)]]


def to_json(findings: Sequence[Finding], answers: Mapping[str, Answer]) -> str:
    """{"exit_code", "findings": [{"level", "what", "text", "advice"}], "answers": {question: {"facts", "problem"}}}."""
    rows = [{**asdict(finding), "level": finding.level.name.lower()} for finding in findings]
    told = {name: asdict(answer) for name, answer in answers.items()}
    return json.dumps({"exit_code": worst(findings).exit_code, "findings": rows, "answers": told}, indent=1)
