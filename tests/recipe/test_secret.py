"""What looks like a password or a key, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtrain.errors import RecipeError
from longtrain.recipe.load import load_recipe
from longtrain.recipe.secret import HIDDEN, hidden, secrets_in
from tests.recipe.bad_recipes import BASE

HEX = "0123456789abcdef0123456789ABCDEF01234567"
LETTERS = "Ab0" * 16
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{LETTERS}\n{LETTERS}\n-----END RSA PRIVATE KEY-----"
SECRETS = {
    "wandb": HEX,
    "wandb among words": f"login {HEX}, please",
    "wandb on premises": f"local-{HEX}",
    "wandb, new": f"wandb_v1_{LETTERS[:22]}_{LETTERS}",
    "OpenAI": f"sk-proj-{LETTERS}-{LETTERS}_x",
    "OpenAI, service": f"sk-svcacct-{LETTERS}",
    "OpenAI, old": f"sk-{LETTERS}",
    "Anthropic": f"sk-ant-api03-{LETTERS}",
    "GitHub": f"ghp_{LETTERS}",
    "GitHub, refresh": f"ghr_{LETTERS}",
    "hub": f"hf_{LETTERS}",
    "JSON web token": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0{LETTERS}.{LETTERS}-_",
    "token without signature": f"eyJhbGciOiJub25lIn0.eyJzdWIi{LETTERS}.",
    "PEM": PEM,
    "PEM in one line": PEM.replace("\n", " "),
    "PKCS 8, cut short": f"-----BEGIN PRIVATE KEY-----\n{LETTERS}",
    "OpenSSH": PEM.replace("RSA", "OPENSSH"),
    "PGP": PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK"),
}
ORDINARY = [
    *(f"org/name@{HEX}", f"weights/{HEX}", f"hf:org/name:{HEX}", f"https://example.org/a?revision={HEX}", HEX[:12], HEX + HEX[:24]),
    *(
        "sk-learn-data/of-2024-with-a-very-long-name-indeed",
        "data/task-projects",
        "desk-proj-0123456789012345678901234",
        "ghr_short",
    ),
    *("wandb_v1_tests", "eyJ", "data/eyJohnsons.books.jsonl", "-----BEGIN PUBLIC KEY-----", "tokens=32768", "weights/llama-2-7b"),
]


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_hidden(kind: str) -> None:
    secret = SECRETS[kind]
    for value in (secret, f"a {secret}"):
        assert list(secrets_in({"a": {"b": [value]}})) == [("a", "b", 0)]
        assert list(secrets_in({value: 1})) == [(value,)]
        assert HIDDEN in hidden(value)
        assert not any(part in hidden(value) for part in (HEX, LETTERS))


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("place", ["data.corpus", "model.init", "tracking.entity", "tracking.tags", "training.steps"])
def test_a_recipe_with_a_secret_is_refused_and_does_not_repeat_it(write, kind: str, place: str) -> None:
    section, _, name = place.partition(".")
    quoted = SECRETS[kind].replace("\n", "\\n")
    value = f'["{quoted}"]' if name == "tags" else f'"{quoted}"'
    write(BASE)
    Path("child.yaml").write_text(f"extends: ./x.yaml\nname: child\n{section}: {{{name}: {value}}}\n")
    for path, overrides in (("child.yaml", []), ("x.yaml", [f"{place}={value}"])):
        with pytest.raises(RecipeError, match=r"looks like a password or a key") as caught:
            load_recipe(path, overrides)
        # no more of it than what says its kind
        assert not any(part in str(caught.value) for part in (HEX[:13], LETTERS[:13]))


@pytest.mark.parametrize("kind", ["wandb", "wandb, new", "OpenAI", "GitHub, refresh", "JSON web token", "PEM in one line"])
@pytest.mark.parametrize("key", ["tracking.entity", "training.steps", "wandb_key"])
def test_one_without_quotes_on_the_command_line_is_not_repeated(write, kind: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(BASE), [f"{key}={SECRETS[kind]}"])
    assert not any(part in str(caught.value) for part in (HEX[:13], LETTERS[:13]))
    assert key in str(caught.value)


FILES = (
    "https://me:hunter2secret@host/x.yaml",
    "https://me:hunter2secret@host/../x.yaml",
    "https://me:hunter2secret@host/x",
    f"./hf_{LETTERS}.yaml",
    f"hf_{LETTERS}",
    f"~/hf_{LETTERS}.yaml",
)


@pytest.mark.parametrize("file", FILES)
def test_the_name_of_a_recipe_is_not_repeated_with_a_secret(write, file: str) -> None:
    write(f"extends: {file}\nname: child\n")
    for path, there in (("x.yaml", "x.yaml:1: extends: "), (file, "")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(there)
        assert not any(part in str(caught.value) for part in ("hunter2secret", LETTERS[:13]))


def test_nor_is_that_of_one_that_is_there(write) -> None:
    file = f"hf_{LETTERS}.yaml"
    Path(write("seed: [\n")).rename(file)
    Path("child.yaml").write_text(f"extends: ./{file}\nname: child\n")
    for path in (file, f"./{file}", "child.yaml"):
        with pytest.raises(RecipeError, match=r"\*{3}\.yaml:[12]: not valid YAML: ") as caught:
            load_recipe(path)
        assert LETTERS[:13] not in str(caught.value)


@pytest.mark.parametrize("text", ORDINARY)
def test_what_is_no_secret_is_not_taken_for_one(text: str) -> None:
    assert hidden(text) == text
    assert list(secrets_in({"a": text})) == []


def test_the_weights_of_a_commit_may_be_named(write) -> None:
    assert load_recipe(write(BASE), [f"model.init=weights/name@{HEX}"]).model.init == f"weights/name@{HEX}"
