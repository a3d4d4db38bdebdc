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

# how the names end that are given to secrets; key_value_heads, tokens and tokenizer do not
_KINDS = "api|access|private|secret|auth|account|client|encryption|master|signing|storage"
_KEY = rf"(?:(?:{_KINDS})[_-]?key|(?:client|app)[_-]?secret)['\"]?"
# these are said of other things too: what follows must look like no word
_TOKEN = r"(?:token|secret|(?-i:[A-Z0-9]_KEY))['\"]?"
_QUOTED = r" *['\"]?"
_NO_WORD = r"(?:\S*\d|[^\s/]{16})"

# each with one group: what is secret
_LOOKS = tuple(
    re.compile(pattern)
    for pattern in (
        # the user of an address
        r"://([^/\s@]+)@",
        # an assignment, as in a shell or in the query of an address
        rf"(?i)(?:{_KEY}|{_TOKEN}(?= *={_QUOTED}{_NO_WORD})|signature|credentials?|[?&]sig) *={_QUOTED}([^\s&]{{8,}})",
        # the same as YAML, JSON or a header has it; what follows a name in `hf:NAME:CONFIG` is none, nor a word after `next-token:`
        rf"(?i)(?<![\w./:-])[\w-]*(?:{_KEY}|{_TOKEN}(?= *:{_QUOTED}{_NO_WORD})) *:{_QUOTED}([^\s&]{{8,}})",
        # people choose short ones; `password: unknown key` is what a recipe with such a key is told
        rf"(?i)passw(?:or)?d['\"]? *[=:](?! *unknown key){_QUOTED}([^\s&]{{6,}})",
        r"(?i)\bbearer +((?=\S*\d)[\w.~+/-]{12,}=*|[\w.~+/-]{16,}=*)",
        # keys that say of themselves what they are
        r"\b((?:hf_|gh[oprsu]_|npm_)[A-Za-z0-9]{30,}|github_pat_\w{40,}|glpat-[\w-]{20,}|xox[abps]-[\w-]{20,}|A[KS]IA[0-9A-Z]{16})\b",
        r"\b(wandb_v\d+_\w{20,}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|gsk_[A-Za-z0-9]{30,}|dckr_[op]at_[\w-]{20,})",
        r"\b(AIza[\w-]{20,}|ya29\.[\w.-]{20,}|GOCSPX-[\w-]{20,}|nvapi-[\w-]{20,}|pypi-Ag[\w-]{20,})",
        r"\b(sk-(?:proj|svcacct|admin|ant)-[\w-]{20,}|sk-[A-Za-z0-9]{32,})",
        # of other makers: in names that begin so, such as sk-learn-data-of-2024, hyphens are closer together, and letters do not
        # change to digits, or small ones to capitals, again and again
        r"(?<![\w./-])(sk-(?:[\w-]*-)?(?:(?=[A-Za-z]*[0-9]+[A-Za-z]+[0-9])[A-Za-z0-9]{16,}"
        r"|(?=(?:[A-Za-z0-9]*?[a-z][A-Z]){3})[A-Za-z0-9]{24,})[\w-]*)",
        # 40 hexadecimal digits that stand alone are an older key of wandb's; behind a name, `@` or `/` they are a commit
        r"(?:(?<![^\s'\"\[{(,])|\blocal-|--set [\w.-]+=)([0-9a-fA-F]{40})(?=:?(?:[\s'\"\]}),;]|$))",
        # a JSON web token (RFC 7519), whole or cut short
        r"\b(eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)*)",
        r"(-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?s:.{0,16384}?)-----END [A-Z0-9 ]*-----|[\w+/=\s\\]*))",
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
