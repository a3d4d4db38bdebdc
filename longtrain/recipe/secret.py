"""Passwords and keys, by what they look like. A recipe must hold none: it is copied to the run's folder, to every checkpoint and to
experiment trackers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from longtrain.recipe.tree import Path

HIDDEN = "***"
ADVICE = (
    "looks like a password or a key, and a recipe is copied to the run's folder, to checkpoints and to trackers; delete it, and "
    "give it to the library that needs it in that one's own way (its login, or a variable such as HF_TOKEN or WANDB_API_KEY); of "
    "the hash of a commit, 12 digits are enough"
)

# each with one group: what is secret
_LOOKS = tuple(
    re.compile(pattern)
    for pattern in (
        # the user of an address
        r"://([^/\s@]+)@",
        # an assignment, as in the query of an address
        r"(?i)(?:api_?key|passw(?:or)?d|secret|token|signature|credentials?)=([^\s&]{8,})",
        # keys that say of themselves what they are
        r"\b((?:hf_|gh[oprsu]_)[A-Za-z0-9]{30,}|github_pat_\w{40,}|glpat-[\w-]{20,}|xox[abps]-[\w-]{20,}|AKIA[0-9A-Z]{16})\b",
        r"\b(wandb_v\d+_\w{20,}|sk-(?:proj|svcacct|admin|ant)-[\w-]{20,}|sk-[A-Za-z0-9]{40,})",
        # 40 hexadecimal digits that stand alone are an older key of wandb's; behind a name, `@` or `/` they are a commit
        r"(?:(?<![^\s'\"\[{(,])|\blocal-|--set [\w.-]+=)([0-9a-fA-F]{40})(?=:?(?:[\s'\"\]}),;]|$))",
        # a JSON web token (RFC 7519), whole or cut short
        r"\b(eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)*)",
        r"(-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?s:.*?)-----END [A-Z0-9 ]*-----|[\w+/=\s\\]*))",
    )
)


def secrets_in(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where in a recipe's plain values a text, or a name, holds what looks like a secret."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets_in(str(name), (*path, name))
            yield from secrets_in(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from secrets_in(inner, (*path, number))
    elif isinstance(value, str) and hidden(value) != value:
        yield path


def hidden(text: str) -> str:
    """The text with HIDDEN in the place of what looks like a secret."""
    for look in _LOOKS:
        text = look.sub(lambda match: match[0].replace(match[1], HIDDEN), text)
    return text
