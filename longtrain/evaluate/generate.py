"""Text from a trained model, for a first look; it recomputes the whole sequence for every token."""

from __future__ import annotations

import torch

from longtrain.attention import AttentionMask, Band
from longtrain.models.decoder import Decoder


@torch.no_grad()
def generate(model: Decoder, prompt: list[int], tokens: int, *, temperature: float, seed: int, end: int | None = None) -> list[int]:
    """`prompt` (at least one id) and up to `tokens` ids after it, stopping at `end`. temperature 0 takes the most likely token.

    The context is cut to the model's longest sequence. The same seed gives the same text on the same machine.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = AttentionMask(Band.causal(model.config.window))
    ids = list(prompt)
    for _ in range(tokens):
        context = torch.tensor([ids[-model.config.max_positions :]])
        logits = model(context, torch.arange(context.shape[1])[None], mask)[0, -1]
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            # at most 0, so that no temperature overflows
            scaled = (logits - logits.max()).double() / temperature
            chosen = int(torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator))
        ids.append(chosen)
        if chosen == end:
            break
    return ids
