"""What people take home is what was trained, in transformers too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longtrain.attention import AttentionMask, Band
from longtrain.data.tokenizer import Tokenizer
from longtrain.errors import CheckpointError, DataError
from longtrain.models.families import hugging_face_names
from longtrain.plan.plan import model_config
from longtrain.recipe.schema import Precision
from longtrain.train.checkpoint_folder import read_master
from longtrain.train.export import export_checkpoint, load_trained
from longtrain.train.resume import find_checkpoint
from tests.user import CHECKPOINT, VOCAB, train

pytest_plugins = ("tests.desks",)
pytestmark = pytest.mark.usefixtures("trained")

RUN = Path("run")
TEXT = "def line_7(x):\n    return  x + 12  # für 语\n"


@torch.no_grad()
def logits_of(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    trained = load_trained(path)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return trained.model(tokens, positions, AttentionMask(Band.causal(trained.recipe.model.window)))


@pytest.mark.parametrize("source", [RUN, RUN / "checkpoints", CHECKPOINT], ids=["run", "checkpoints", "checkpoint"])
def test_transformers_computes_the_same(source: Path) -> None:
    export_checkpoint(source, Path("out"))
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.dtype is torch.float32
    tokens = torch.randint(VOCAB, (2, 32))
    with torch.no_grad():
        found = model(tokens).logits
    assert found.std() > 0.1, "logits that say something"
    torch.testing.assert_close(found, logits_of(source, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, *Precision])
def test_weights_are_the_master_weights(dtype: Precision | None) -> None:
    export_checkpoint(RUN, Path("out"), dtype)
    wanted = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    names = hugging_face_names(model_config(load_trained(RUN).recipe))
    exported = load_file("out/model.safetensors")
    master = dict(read_master(CHECKPOINT))
    assert {names[name] for name in master} == exported.keys()
    for name, value in master.items():
        assert exported[names[name]].dtype is wanted
        assert torch.equal(exported[names[name]], value.to(wanted))
    assert AutoModelForCausalLM.from_pretrained("out").dtype is wanted


def test_format_follows_the_training() -> None:
    said = train("--set", "output=low", "--set", "training.precision=bf16", "--set", "training.steps=1")
    assert said.code == 0, said.text
    assert json.loads(Path("low/huggingface/config.json").read_text())["dtype"] == "bfloat16"


def test_an_older_checkpoint_by_its_path() -> None:
    older = CHECKPOINT.with_name("step-00000002")
    assert load_trained(older).step == 2
    assert load_trained(RUN).step == 3
    tokens = torch.arange(8)[None]
    assert not torch.equal(logits_of(older, tokens), logits_of(RUN, tokens))
    assert find_checkpoint(RUN) == CHECKPOINT
    assert find_checkpoint(older) == older


def test_tokenizer_gives_the_same_ids() -> None:
    export_checkpoint(RUN, Path("out"))
    ours, theirs = Tokenizer.load("data/tokenizer.model"), AutoTokenizer.from_pretrained("out")
    assert theirs(TEXT, add_special_tokens=False).input_ids == ours.encode(TEXT)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    assert Path("out/tokenizer.model").read_bytes() == ours.model


def test_tied_window_and_ring_shapes_survive() -> None:
    changes = ["output=tied", "training.steps=1", "model.tied_embeddings=true", "model.window=5", "model.rope_theta=500.0"]
    said = train(*(word for change in changes for word in ("--set", change)))
    assert said.code == 0, said.text
    tokens = torch.randint(VOCAB, (1, 24))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained("tied/huggingface")(tokens).logits
    torch.testing.assert_close(found, logits_of(Path("tied"), tokens), rtol=0, atol=1e-5)


def test_refusals_write_nothing() -> None:
    with pytest.raises(CheckpointError, match="run exists"):
        export_checkpoint(RUN, RUN)
    with pytest.raises(DataError, match=r"nowhere: the data of .* --data FOLDER"):
        export_checkpoint(RUN, Path("out"), data=Path("nowhere"))
    with pytest.raises(CheckpointError, match="no such folder"):
        export_checkpoint(Path("nowhere"), Path("out"))
    assert sorted(path.name for path in Path().iterdir()) == ["data", "recipe.yaml", "run"]
