"""What looks like a password or a key, and what does not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from longtrain.errors import RecipeError
from longtrain.recipe.load import builtin_recipes, dump_recipe, load_recipe
from longtrain.recipe.secret import HIDDEN, hidden, secrets_in
from tests.recipe.bad_recipes import BASE

DOCUMENTS = Path(__file__).parents[2]
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
    "OpenRouter": f"sk-or-v1-{LETTERS}",
    "sk, of another maker": f"sk-FAKE-{LETTERS[:24]}",
    "sk, letters alone": f"sk-FAKE-{LETTERS.replace('0', 'c')[:26]}",
    "Google": f"AIzaSy{LETTERS[:33]}",
    "Google, short-lived": f"ya29.a0{LETTERS}-_x",
    "NVIDIA": f"nvapi-{LETTERS}",
    "Stripe": f"sk_live_{LETTERS[:24]}",
    "npm": f"npm_{LETTERS[:36]}",
    "PyPI": f"pypi-AgEIcHlwaS5vcmc{LETTERS}",
    "Docker": f"dckr_pat_{LETTERS[:27]}",
    "AWS": f"AWS_SECRET_ACCESS_KEY={LETTERS}",
    "AWS, in YAML": f"aws_secret_access_key: {LETTERS}",
    "AWS, short-lived": f"aws_session_token = {LETTERS}",
    "secret key": f"secret_key={LETTERS}",
    "API key": f"api-key={LETTERS}",
    "API key, header": f"X-Api-Key: {LETTERS}",
    "API key, JSON": f"{{'api_key': '{LETTERS}'}}",
    "any key of an environment": f"OPENROUTER_KEY={LETTERS}",
    "token": f"token: {LETTERS}",
    "token of letters": f"token: {LETTERS.replace('0', 'c')}",
    "password": f"password: {LETTERS}",
    "bearer": f"Authorization: Bearer {LETTERS}",
    "signed address": f"https://example.org/a?sv=1&sig={LETTERS}",
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
    *("hf:owner/sk-model", "weights/sk-Llama-2-7B-Instruct-of-2024", "sk-Llama-2-7B-Instruct-32K", "sk-internationalization"),
    *("sk-slovakwikipedia2024corpus", "hf:sk-slovakwikipedia2024corpus/x", "/data/SORT_KEY=document_length/run"),
    *("data/eos_token=<|endoftext|>", "secret: baseline-run"),
    *("data/tokens", "tokens: 1000000000", "tokens_per_step=33554432", "token-level loss: weighted", "next-token: prediction"),
    *(
        "key_value: 8 heads",
        "num_key_value_heads=8",
        "kv-key: layers-of-all",
        "text_key=contents-of-page",
        "s3://bucket/key=2024-01-01",
    ),
    *("tokenizer: weights/llama-2-7b", "--set data.tokenizer=weights/llama-2-7b", "data.tokenizer: weights/Llama-2-7b-hf"),
    *("hf:secret-stories:sample-10BT", "hf:owner/secret:sample-10BT", "data/the-secret-garden"),
    *(
        "expected 'key: value' lines",
        "x.yaml:3: password: unknown key",
        "x.yaml:3: data.password: unknown key; the keys here are a",
    ),
    *(
        "ring bearer of news",
        "pypi-downloads-of-2024-by-project",
        "nvapi",
        "npm_packages_of_2024_with_readme_files",
        "sk_test_data_of_2024",
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


@pytest.mark.parametrize("assignment", ["password=hunter2", "PASSWORD: hunter2", "my passwd = hunter2", '{"password":"hunter2"}'])
def test_a_password_may_be_short(assignment: str) -> None:
    assert "hunter2" not in hidden(assignment)


@pytest.mark.parametrize("name", ["tracking.group", "tracking.tags", "nowhere"])
@pytest.mark.parametrize("kind", ["AWS", "secret key", "API key", "Google", "NVIDIA", "sk, of another maker"])
def test_a_refused_argument_is_not_repeated(write, kind: str, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(BASE), [f"{name}={SECRETS[kind]}"])
    assert LETTERS[:13] not in str(caught.value)


def test_nothing_that_we_write_ourselves_looks_like_one() -> None:
    """Recipes, resolved too, and every line of the documents."""
    written = [path.read_text(encoding="utf-8") for path in builtin_recipes().values()]
    written += [dump_recipe(load_recipe(name)) for name in builtin_recipes()]
    written += [path.read_text(encoding="utf-8") for path in (*DOCUMENTS.glob("*.md"), *DOCUMENTS.glob("docs/*.md"))]
    assert len(written) > 20
    for line in {line for text in written for line in text.splitlines()}:
        assert hidden(line) == line


def test_a_long_text_takes_no_longer_than_its_length() -> None:
    """A recipe may have a mebibyte, all of it in one value."""
    began = time.process_time()
    for part in (
        "sk-",
        "sk-a-",
        "token",
        "token=",
        "token:",
        "secret_",
        "api_key ",
        "password ",
        "A_KEY",
        "://",
        "bearer ",
        "a" * 9,
        " ",
    ):
        hidden(part * (2**17 // len(part)))
    assert time.process_time() - began < 10


@pytest.mark.parametrize("text", ORDINARY)
def test_what_is_no_secret_is_not_taken_for_one(text: str) -> None:
    assert hidden(text) == text
    assert list(secrets_in({"a": text})) == []


def test_the_weights_of_a_commit_may_be_named(write) -> None:
    assert load_recipe(write(BASE), [f"model.init=weights/name@{HEX}"]).model.init == f"weights/name@{HEX}"
