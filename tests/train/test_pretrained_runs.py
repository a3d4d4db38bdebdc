"""Training from imported weights, on several ranks at every way that ZeRO keeps parameters, and with fused layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from longtrain.data.json_tokenizer import JsonTokenizer
from longtrain.data.manifest import MANIFEST, TOKENIZER_JSON
from longtrain.data.tokenizer import entry_of
from longtrain.errors import CheckpointError, DataError
from longtrain.kernels.language import interprets
from longtrain.models.families import hugging_face_names
from longtrain.parallel.context import ParallelContext
from longtrain.plan import make_plan
from longtrain.plan.describe import describe
from longtrain.train.assemble import assemble, open_data, open_weights, warnings
from longtrain.train.resume import Start
from longtrain.train.step import prepare_step, train_step
from tests.distributed import RankError, run_ranks
from tests.tiny import VOCAB, tiny_recipe, write_corpus

SHARED = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None}
CONFIGS = {
    "llama": LlamaConfig(
        **SHARED, intermediate_size=48, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=48, initializer_range=0.05
    ),
    "opt": OPTConfig(**SHARED, ffn_dim=48, max_position_embeddings=48, init_std=0.05),
}


def _recipe(folder: str, name: str, *overrides: str) -> Any:
    return tiny_recipe(f"data.path={folder}/data", f"output={folder}/run", f"model.init={folder}/{name}", *overrides)


def _start(ctx: ParallelContext, folder: str, name: str, overrides: list[str]) -> dict[str, Any]:
    plan = make_plan(_recipe(folder, name, *overrides), ctx.world, "cpu")
    run = assemble(plan, ctx, open_data(plan)[0], Start(None))
    pieces = [(r.name, r.start, r.tensors["master"].tolist()) for r in run.engine.owned_ranges()]
    losses = [train_step(run.engine, plan, ctx, prepare_step(plan, ctx, run.loader.step(step)), 1e-3).loss for step in range(2)]
    run.close()
    norm: Any = run.engine.model.get_submodule("norm")
    return {"pieces": pieces, "losses": losses, "norm": norm.layers.add_rms_norm.__module__}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrained")
    write_corpus(root / "data", 30)
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name, max_shard_size="20KB")
    return root


def whole(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for rank in ranks:
        for name, start, values in rank["pieces"]:
            found.setdefault(name, []).append((start, values))
    return {name: torch.tensor([x for _, values in sorted(parts) for x in values]) for name, parts in found.items()}


@pytest.mark.parametrize(("name", "stage"), [("llama", 0), ("llama", 1), ("llama", 3), ("opt", 3)])
def test_masters_are_the_stored_weights(folder: Path, name: str, stage: int) -> None:
    ranks = run_ranks(_start, 2, str(folder), name, [f"zero.stage={stage}"])
    names = hugging_face_names(make_plan(_recipe(str(folder), name), 2, "cpu").model)
    stored = {key: value for file in (folder / name).glob("*.safetensors") for key, value in load_file(file).items()}
    found = whole(ranks)
    assert {names[own] for own in found} == stored.keys()
    for own, value in found.items():
        assert torch.equal(value, stored[names[own]].flatten()), own
    assert ranks[0]["losses"] == ranks[1]["losses"]


@pytest.mark.skipif(not interprets(), reason="kernels run on CPUs in Triton's interpreter only")
@pytest.mark.parametrize("name", ["llama", pytest.param("opt", marks=pytest.mark.faults)])
def test_fused_layers_train_alike_where_parameters_are_gathered(folder: Path, name: str) -> None:
    fused = "[norm, rotary, mlp, loss]" if name == "llama" else "[norm, loss]"
    short = ["zero.stage=3", "training.batch_size=2", "training.sequence_length=12"]
    plain, fast = (run_ranks(_start, 2, str(folder), name, [*short, f"training.fused={f}"])[0] for f in ("none", fused))
    assert fast["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert (plain["norm"], fast["norm"]) == ("longtrain.kernels.plain", "longtrain.kernels.norms")


def test_weights_that_are_not_whole_are_refused_on_every_rank(folder: Path) -> None:
    shutil.copytree(folder / "llama", folder / "broken")
    next((folder / "broken").glob("model-00002*")).unlink()
    with pytest.raises(RankError, match=CheckpointError.__name__):
        run_ranks(_start, 2, str(folder), "broken", ["zero.stage=3"])


def _letters(letters: str) -> JsonTokenizer:
    vocab = {name: index for index, name in enumerate(["<s>", "</s>", *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens(["<s>", "</s>"])
    return JsonTokenizer(made.to_str().encode(), 0, 1)


def test_data_of_another_tokenizer_than_the_weights(folder: Path, tmp_path: Path) -> None:
    """A run does not begin; one that goes on is past it."""
    data, init = write_corpus(tmp_path / "data", 3), shutil.copytree(folder / "llama", tmp_path / "llama")
    own, other = _letters("abcdef"), _letters("badcfe")
    manifest = json.loads((data / MANIFEST).read_bytes())
    (data / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": entry_of(own).model_dump()}))
    (data / TOKENIZER_JSON).write_bytes(own.model)
    (init / TOKENIZER_JSON).write_bytes(other.model)
    plan = make_plan(_recipe(str(tmp_path), "llama", "training.sequence_length=49"), 1, "cpu")
    with pytest.raises(DataError, match=rf"^data\.path: {data} was prepared with another tokenizer .* of model\.init {init}, "):
        open_weights(plan, Start(None))
    assert open_weights(plan, Start(data)) is None
    told = [text for what, text in describe(plan) if what == "warning"]
    assert [text.split(":")[0] for text in told] == [
        "the weights of model.init know 48 positions; those beyond, up to 49, are new to them",
        "a new run is refused",
    ]

    (init / TOKENIZER_JSON).write_bytes(own.model)
    assert open_weights(plan, Start(None)) is not None
    split = open_data(plan)[0]
    told = [f"warning: {text}" for what, text in describe(plan) if what == "warning"]
    assert len(told) == 1
    assert warnings(split, plan) == [*warnings(split), *told]
