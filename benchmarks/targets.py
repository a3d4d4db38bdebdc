"""What the figures are held against, and which of them fall short: for the benchmarks that take them and the page that shows them.

Every function takes rows of a results file. A ratio just below its target falls short, by however little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Rows = list[dict[str, Any]]
PEERS = {
    "forward": {"cudnn": 0.85, "flex": 1.25, "flash": 1.4},
    "backward": {"flex": 1.0, "flash": 1.2},
}
"""How many times a peer's rate ours should be: set for full, causal and grouped heads at d64 and d128, held against every row."""
NAMES = {"cudnn": "cuDNN", "flex": "FlexAttention", "flash": "FlashAttention-2"}
LONG = 1.0
"""Of 16K causal's rate at 128K."""
TOUCHED = 0.85
"""Of 16K causal's rate under a window or over documents, both counted in the pairs of touched tiles."""
WORKSPACE = 2.0
"""Times the size of q that forward and backward may hold besides out, dout and the gradients."""
PLAIN_SPEED, PLAIN_MEMORY = 2.0, 0.5
"""Against plain torch attention: times its speed, forward and backward together, and at most so much of its memory."""
COPY = {"forward": 0.9, "backward": 0.8}
"""Of a copy's rate, for layers."""
LOSS, LOSS_MIB = 0.85, 1024
"""Of the rate of the bare products with fp32 results, and memory besides dx and one fp32 dW, at a vocabulary of 128K."""
DIRECTIONS = ("forward", "backward")


def attention(rows: Rows) -> dict[str, list[str]]:
    """Target in words -> the rows that miss it, with what they reach. A target that nobody misses is left out."""
    found: dict[str, list[str]] = {}
    causal = {row["problem"]["dim"]: row for row in rows if row["problem"]["name"].startswith("16K causal d")}
    for row in rows:
        base = causal.get(row["problem"]["dim"])
        for target, reached in (*_peers(row), *(_causal(row, base) if base else ()), *_memory(row), *_plain(row)):
            found.setdefault(target, []).append(f"{row['problem']['name']} {reached}")
    return found


def layers(rows: Rows, copy: float) -> list[str]:
    shares = ((row, way, row["results"]["fused"][way] / copy) for row in rows for way in DIRECTIONS)
    return [f"{row['layer']} {way}: {share:.2f} < {COPY[way]}" for row, way, share in shares if share < COPY[way]]


def loss(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        ours, bare, p = row["results"]["ours"], sum(row["bare_ms"].values()), row["problem"]
        if p["vocabulary"] == 2**17 and bare / ours["ms"] < LOSS:
            lines.append(f"{p['tokens']} tokens: {bare / ours['ms']:.3f} of the bare products' rate (target {LOSS})")
        if p["vocabulary"] == 2**17 and ours["extra_mib"] >= LOSS_MIB:
            lines.append(f"{p['tokens']} tokens: {ours['extra_mib']:.0f} MiB besides dx and dW (target: under {LOSS_MIB})")
    return lines


def workspace(row: dict[str, Any]) -> float:
    """Of our forward and backward, besides out, dout, dq, dk and dv: in sizes of q. bf16, values as wide as keys."""
    p = row["problem"]
    q = 2 * p["batch"] * p["length"] * p["heads"] * p["dim"]
    return row["results"]["ours"]["memory_mib"] * 2**20 / q - 3 - 2 * p["kv_heads"] / p["heads"]


def _peers(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    found = row["results"]
    for direction, peers in PEERS.items():
        for name, target in peers.items():
            if direction in found.get(name, {}):
                ratio = found["ours"][direction] / found[name][direction]
                if ratio < target:
                    yield f"{direction}, {target} times {NAMES[name]}", f"{ratio:.3f}"


def _causal(row: dict[str, Any], base: dict[str, Any]) -> Iterator[tuple[str, str]]:
    p, ours, causal = row["problem"], row["results"]["ours"], base["results"]["ours"]
    if p["documents"] or p["band"]["hi"] is not None:
        what, target, waste = "as fast as 16K causal a touched tile", TOUCHED, row["touched"] / base["touched"]
    elif p["length"] >= 2**17 and p["band"]["lo"] == 0:
        what, target, waste = "as fast as 16K causal", LONG, 1.0
    else:
        return
    for direction in DIRECTIONS:
        ratio = ours[direction] * waste / causal[direction]
        if ratio < target:
            yield f"{direction}, {target} times {what}", f"{ratio:.3f}"


def _memory(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (size := workspace(row)) >= WORKSPACE:
        yield f"memory besides results under {WORKSPACE} times q", f"{size:.2f}"


def _plain(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    ours, plain = row["results"]["ours"], row["results"].get("naive", {})
    if "forward_ms" not in plain:
        return
    speed, memory = plain_speed(row), ours["memory_mib"] / plain["memory_mib"]
    if speed < PLAIN_SPEED:
        yield f"{PLAIN_SPEED} times as fast as plain torch", f"{speed:.2f}"
    if memory > PLAIN_MEMORY:
        yield f"at most {PLAIN_MEMORY} of plain torch's memory", f"{memory:.2f}"


def plain_speed(row: dict[str, Any]) -> float:
    """How many times as fast as plain torch ours is, forward and backward together."""
    ours, plain = (sum(row["results"][name][f"{way}_ms"] for way in DIRECTIONS) for name in ("ours", "naive"))
    return plain / ours
