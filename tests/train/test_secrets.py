"""A secret in the environment stays there; one in a recipe is refused, and not repeated."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longtrain.errors import RecipeError
from longtrain.recipe.load import load_recipe
from tests.fake_wandb import FakeWandb
from tests.user import SCRIPT, command, process, train

pytest_plugins = ("tests.desks",)

NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_API_KEY", "AZURE_CLIENT_SECRET", "SLURM_JWT"),
    *("DATABASE_URL", "PASSWORD", "NETRC_PASSWORD", "NCCL_SECRET", "LONGTRAIN_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
)
SECRETS = {name: f"5ec7e7abcdef01{number:02d}" + "23456789abcdef" + "0" * 10 for number, name in enumerate(NAMES)}
"""By the variable that holds it; 40 hexadecimal digits, as wandb wants its keys."""
SEEN = "to-be-seen"
"""A tag of the run, which must be found where the search looks."""
TRACKED = ("--set", "tracking.wandb=offline", "--set", f"tracking.tags=[{SEEN}]")


def _unpacked(content: bytes) -> Iterator[bytes]:
    """A file, and what is packed into it."""
    yield content
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from _unpacked(archive.read(name))
    if content[:1] == b"\x78":
        with_errors = zlib.decompressobj()
        try:
            yield with_errors.decompress(content)
        except zlib.error:
            return


def _written(secret: str) -> tuple[bytes, ...]:
    """A secret in the ways that it may be written, without its ends where an encoding mixes them with what is beside."""
    raw = secret.encode()
    coded = [base64.b64encode(b"x" * shift + raw)[4:-4] for shift in range(3)]
    return raw, raw[::-1], secret.upper().encode(), secret.encode("utf-16-le"), raw.hex().encode(), *coded


def _leaks(*texts: str) -> list[str]:
    """Which secret is in which file under the current folder, or in a text."""
    forms = {name: _written(secret) for name, secret in SECRETS.items()}
    places: list[tuple[str, bytes]] = [(f"text {number}", text.encode()) for number, text in enumerate(texts)]
    places += [(str(path), path.read_bytes()) for path in Path().rglob("*") if path.is_file()]
    places += [("names of files", "\n".join(str(path) for path in Path().rglob("*")).encode())]
    return [
        f"{name} in {place}"
        for place, content in places
        for part in _unpacked(content)
        for name, written in forms.items()
        if any(form in part for form in written)
    ]


def _sees(folder: Path) -> bool:
    return any(SEEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb | None:
    """None where there is a real one."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake
    return None


@pytest.fixture
def planted(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk whose environment, and the comments of whose recipe, are full of secrets."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    recipe = Path("recipe.yaml")
    recipe.write_text(f"# {SECRETS['WANDB_API_KEY']}\n{recipe.read_text()}# HF_TOKEN={SECRETS['HF_TOKEN']}\n")


def _clean_recipe() -> None:
    """The user's own recipe is the one place where a secret may be."""
    recipe = Path("recipe.yaml")
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("#")))


@pytest.mark.usefixtures("planted")
def test_of_the_environment_nothing_is_written(wandb: FakeWandb | None, capfd: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed, exported and reported on; refused; and torn down."""
    said = [train(*TRACKED, "--until", "2"), train(*TRACKED)]
    said += [command("checkpoint", "ls", "run", "--verify"), command("export", "run", "--out", "out")]
    said += [command("report", "run", "--tokens", "2")]
    assert [one.code for one in said] == [0] * len(said), said
    refused = [train("--set", "optimizer.lr=0.5"), train("--set", "data.path=nowhere"), train("--set", "traning.steps=1")]
    assert [one.code for one in refused] == [2] * 3
    config = json.dumps([run.arguments for run in wandb.runs], default=str) if wandb else ""
    _clean_recipe()
    assert _leaks(*(one.text for one in said + refused), config, *capfd.readouterr()) == []
    for folder in ("run", "run/checkpoints"):
        assert _sees(Path(folder)), "the search must find what is there"
    assert SEEN in config if wandb else _sees(Path("run/wandb"))


@pytest.mark.faults
@pytest.mark.usefixtures("planted")
def test_of_two_ranks_and_the_doctor_nothing_is_written() -> None:
    """As people start them, so that everything that any library prints is seen."""
    from importlib.util import find_spec

    extras = [*(TRACKED if find_spec("wandb") else TRACKED[2:]), "--set", "parallel.cp=2"]
    extras += ["--set", "tracking.tensorboard=true"] if find_spec("tensorboard") else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    texts = []
    for words, code in (
        ([*torchrun, "--recipe", "recipe.yaml", *extras, "--until", "2"], 0),
        ([*torchrun, "--recipe", "recipe.yaml", *extras], 0),
        ([*torchrun, "--recipe", "recipe.yaml", *extras, "--set", "optimizer.lr=0.5"], 1),
        ([sys.executable, "-c", "from longtrain.cli import main; main()", "doctor", "--json"], None),
    ):
        done = process(*words)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        texts += [done.stdout, done.stderr]
    _clean_recipe()
    assert _leaks(*texts) == []
    assert _sees(Path("run"))


PLACES: dict[str, Callable[[str], str]] = {
    "user of an address": lambda secret: f"https://user:{secret}@example.org/corpus.jsonl",
    "token for a user": lambda secret: f"https://{secret}@example.org/corpus.jsonl",
    "query": lambda secret: f"https://example.org/corpus.jsonl?download=true&token={secret}",
    "signature": lambda secret: f"s3://bucket/key?X-Amz-Signature={secret}",
    "assignment": lambda secret: f"corpus HF_TOKEN={secret}",
    "hub": lambda secret: f"hf:hf_{secret}",
    "GitHub": lambda secret: f"ghp_{secret}",
}
SECRET = SECRETS["HF_TOKEN"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("field", ["data.corpus", "data.path", "model.init", "output", "data.sources"])
def test_one_in_a_recipe_is_refused_and_not_repeated(place: str, field: str) -> None:
    text, section = PLACES[place](SECRET), field.partition(".")[0]
    value = f"{{{json.dumps(text)}: 1.0}}" if field == "data.sources" else json.dumps(text)
    recipe = Path("recipe.yaml")
    for override in (True, False):
        if not override:
            lines = f"{section}:\n  {field.partition('.')[2]}: {value}\n" if "." in field else f"{field}: {value}\n"
            Path("secret.yaml").write_text(f"extends: recipe.yaml\nname: other\n{lines}")
            recipe = Path("secret.yaml")
        with pytest.raises(RecipeError, match=rf"{field}.*looks like a password or a key") as caught:
            load_recipe(recipe, [f"{field}={value}"] if override else [])
        assert SECRET not in str(caught.value)
        assert "HF_TOKEN or WANDB_API_KEY" in str(caught.value)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("key", ["tracking.wandb_api_key", "tracking.token", "data.password", "hf_token"])
def test_one_under_a_key_that_does_not_exist_is_not_repeated(key: str) -> None:
    with pytest.raises(RecipeError, match="unknown key") as caught:
        load_recipe(Path("recipe.yaml"), [f"{key}={SECRET}"])
    assert SECRET not in str(caught.value)
    section, _, name = key.rpartition(".")
    Path("secret.yaml").write_text(f"extends: recipe.yaml\nname: other\n{section}:\n  {name}: {SECRET}\n" if section else "")
    if section:
        with pytest.raises(RecipeError, match="unknown key") as caught:
            load_recipe(Path("secret.yaml"))
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("data/hf_fineweb_edu_sample_10bt_of_2024_06", "hf:HuggingFaceFW/fineweb-edu:sample-10BT", "https://example.org/a?page=2"),
        *("s3://bucket/key", "/home/me@work/data", "data/tokens_per_rank=8", "runs/0123456789abcdef0123456789abcdef01234567"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_what_is_no_secret_is_not_taken_for_one(text: str) -> None:
    assert load_recipe(Path("recipe.yaml"), [f"data.corpus={json.dumps(text)}"]).data.corpus == text


def test_the_search_finds_what_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = SECRETS["WANDB_API_KEY"].encode()
    Path("a.gz").write_bytes(gzip.compress(b"..." + secret + b"..."))
    Path("b.json").write_text(json.dumps({"key": base64.b64encode(b"user:" + secret).decode()}))
    with zipfile.ZipFile("c.zip", "w") as archive:
        archive.writestr("inner", secret)
    Path(os.fsdecode(secret)).touch()
    places = ("a.gz", "b.json", "c.zip", "names of files")
    assert set(_leaks()) == {f"WANDB_API_KEY in {place}" for place in places}
