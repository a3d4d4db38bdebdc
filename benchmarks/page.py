"""docs/performance.md from the files of benchmarks/results: `python -m benchmarks.page` from the repository root.

What stands between a pair of `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced, the words around it are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import targets

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = "nvidia-h100-80gb-hbm3"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}-{DEVICE}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"`{found['command']}`, {found['device']}, {versions}."


def turns(found: dict[str, Any]) -> str:
    """How libraries were measured beside each other."""
    heat = " and ".join(f"{ms / 1e3:g}" for ms in found.get("heat_ms", {}).values())
    return f"Everyone in turns, {found['rounds']} rounds" + (f", after {heat} s of the same work." if heat else ".")


def attention() -> str:
    found = read("attention")
    names = {"ours": "longtrain", "cudnn": "cuDNN", "flash": "FlashAttention-2", "flex": "FlexAttention", "varlen": "FA-2 varlen"}

    def cell(result: dict[str, Any]) -> str:
        return f"{result['forward']:.0f} / {result['backward']:.0f}" if "forward" in result else "-"

    rows = []
    for row in found["rows"]:
        if "naive" not in row["results"]:
            p = row["problem"]
            shape = f"{p['batch']} x {p['length']}, {p['heads']}/{p['kv_heads']} heads"
            rows.append([p["name"], shape, f"{row['touched']:.2f}", *(cell(row["results"].get(name, {})) for name in names)])
    head = ["", "shape", "touched / visible", *names.values()]
    return f"{source(found)} {turns(found)}\n\n" + table(head, rows)


def targets_missed() -> str:
    rows = read("attention")["rows"]
    lines = [f"- {target}: {', '.join(names)}" for target, names in targets.attention(rows).items()]
    return "\n".join(lines) or "None."


def naive() -> str:
    found, rows = read("attention"), []
    for row in found["rows"]:
        if "naive" in row["results"]:
            ours, plain = row["results"]["ours"], row["results"]["naive"]
            times = [f"{r['forward_ms']:.2f} / {r['backward_ms']:.2f}" for r in (ours, plain)]
            memory = [f"{r['memory_mib']:.0f}" for r in (ours, plain)]
            saved = 1 - ours["memory_mib"] / plain["memory_mib"]
            rows.append(
                [f"{row['problem']['length']} tokens", *times, f"{targets.plain_speed(row):.0f}x", *memory, f"{saved:.0%} less"]
            )
    head = ["", "longtrain, ms", "plain torch, ms", "speed", "longtrain, MiB", "plain torch, MiB", "memory"]
    return table(head, rows)


def layers() -> str:
    found = read("layers")
    rows = []
    for row in found["rows"]:
        of = row["results"]
        cells = [
            f"{of[n]['forward']:.0f} / {of[n]['backward']:.0f}" if "forward" in of.get(n, {}) else "-"
            for n in ("fused", "compile", "liger", "eager")
        ]
        share = [f"{of['fused'][way] / found['copy']:.0%}" for way in ("forward", "backward")]
        rows.append([row["layer"], cells[0], " / ".join(share), *cells[1:]])
    head = ["", "longtrain", "of a copy", "torch.compile", "Liger", "torch"]
    return f"{source(found)} A copy moves {found['copy']:.0f} GB/s. {turns(found)}\n\n" + table(head, rows)


def loss() -> str:
    found = read("loss")
    parts = [f"{source(found)} {turns(found)}"]
    for row in found["rows"]:
        p, bares = row["problem"], [row["bare_ms"], row["bare_bf16_ms"]]
        flop = 2 * p["tokens"] * p["vocabulary"] * p["hidden"]
        rates = ", ".join(f"{name} {flop / time / 1e9:.0f}" for name, time in row["bare_ms"].items())
        quickest = len(row["bare_ms"]) * min(row["bare_ms"].values())
        parts.append(
            f"{p['tokens']} tokens, vocabulary {p['vocabulary']}, hidden {p['hidden']}; the three products alone, fp32 results: "
            f"{sum(row['bare_ms'].values()):.1f} ms ({rates} TFLOP/s). All three at the rate of the quickest would take "
            f"{quickest:.1f} ms: ours runs at {quickest / row['results']['ours']['ms']:.0%} of that."
        )
        cells = []
        for name, r in row["results"].items():
            if "ms" in r:
                shares = [f"{sum(bare.values()) / r['ms']:.0%}" for bare in bares]
                cells.append([name, f"{r['ms']:.1f}", *shares, f"{r['extra_mib']:.0f}"])
        parts.append(table(["", "ms", "of the bare products, fp32 results", "bf16 results", "extra MiB"], cells))
    return "\n\n".join(parts)


def block() -> str:
    found = read("layers")
    rows = found["block"]
    plain = next(row["ms"] for row in rows if not row["fused"])
    cells = [
        [", ".join(row["fused"]) or "none", f"{row['ms']:.1f}", f"{row['ms'] / plain:.3f}", f"{row['peak_gib']:.2f}"]
        for row in rows
    ]
    return table(["fused", "ms", "against none", "peak GiB"], cells)


PEERS = {
    ("llama-7b-32k", "NVIDIA H200"): (
        ("transformers, FlashAttention-2", "4,376", "28.9%", "-", "113"),
        ("transformers, cuDNN", "5,582", "36.9%", "51.5%", "113"),
        ("transformers, cuDNN, Liger", "6,367", "42.1%", "58.7%", "113"),
    )
}
"""Others on the same task, measured with the same 32K tokens a step in one document, all parameters, AdamW with fp32 masters:
Hugging Face transformers 5.17 with gradient checkpointing, torch 2.11. Tokens/s, MFU causal, MFU full, peak GiB."""


def training() -> str:
    """Every card that trained has its file; before the first there is nothing to tell."""
    parts = []
    for path in sorted(RESULTS.glob("training-nvidia-*.json")):
        found = json.loads(path.read_text())
        rows = []
        for row in found["rows"]:
            causal, full = (f"{row[key]:.1%}" for key in ("mfu_causal", "mfu_full"))
            steps = f"{row['steps']} x {row['tokens_per_step']:,}"
            fall = f"{row['loss_first']:.2f} -> {row['loss_last']:.2f}"
            speed, memory = f"{row['tokens_per_second_per_rank']:,.0f}", f"{row['peak_memory_gib']:.0f}"
            rows.append([f"**{row['recipe']}**", steps, speed, causal, full, memory, fall])
            for name, *figures in PEERS.get((row["recipe"], found["device"]), ()):
                rows.append([name, "", *figures, ""])
        head = ["", "steps x tokens", "tokens/s/GPU", "MFU causal", "MFU full", "peak GiB", "loss"]
        proofs = [line for row in found["rows"] for line in _proofs(row)]
        parts += [source(found), table(head, rows), *([" ".join(proofs)] if proofs else [])]
    return "\n\n".join(parts) or "Not measured yet: `python -m benchmarks.training` writes what stands here."


def _proofs(row: dict[str, Any]) -> Iterable[str]:
    if kill := row.get("kill"):
        yield (
            f"{row['recipe']}, killed after step {kill['killed_after']}, went on from step {kill['checkpoint']}; the losses of the "
            f"steps that were trained again differ by {kill['replayed']:.1e} at most."
        )
    if export := row.get("export"):
        yield (
            "Its export gives the logits of our decoder in transformers (fp32, largest difference "
            f"{export['logits_difference']:.1e} of the largest logit) and generates."
        )


PARTS: dict[str, Callable[[], str]] = {f.__name__: f for f in (attention, targets_missed, naive, layers, loss, block, training)}


def page(text: str) -> str:
    """The page with every part made anew."""
    for name, part in PARTS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        assert re.search(pattern, text, re.S), f"{PAGE}: no part {name}"
        text = re.sub(pattern, lambda found, part=part: f"{found[1]}{part()}\n{found[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    print(f"wrote {PAGE}")
