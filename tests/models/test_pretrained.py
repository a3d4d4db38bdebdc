"""Models of every family that transformers made, read from their folders, compute what transformers computes; and back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from longtrain.attention import AttentionMask, Band
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import CheckpointError
from longtrain.kernels.local import LocalAttend
from longtrain.models import Decoder, hugging_face_names
from longtrain.models.config_json import read_config
from longtrain.models.huggingface import write_folder
from longtrain.models.initialise import initial_value
from longtrain.models.pretrained import load_pretrained, open_pretrained
from longtrain.models.rope import Yarn

SHARED = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None}
ROTARY = SHARED | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 40}
LONG = {"original_max_position_embeddings": 16}
LENGTH = 40


def rope(kind: str, **values: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


YARN = {"factor": 2.5, **LONG}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}
LONGROPE = {"factor": 2.5, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 4.0], **LONG}
MODELS = {
    "llama": LlamaConfig(**ROTARY),
    "llama-tied": LlamaConfig(**ROTARY, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-wide-heads": LlamaConfig(**ROTARY, head_dim=16, **rope("default")),
    "llama-gelu": LlamaConfig(**ROTARY, hidden_act="gelu"),
    "llama-gelu-tanh": LlamaConfig(**ROTARY, hidden_act="gelu_pytorch_tanh"),
    "linear": LlamaConfig(**ROTARY, **rope("linear", factor=4.0)),
    "dynamic": LlamaConfig(**ROTARY | {"max_position_embeddings": 16}, **rope("dynamic", factor=2.5)),
    "yarn": LlamaConfig(**ROTARY, **rope("yarn", **YARN)),
    "yarn-betas": LlamaConfig(**ROTARY, **rope("yarn", **YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3)),
    "yarn-mscale": LlamaConfig(**ROTARY, **rope("yarn", **YARN, mscale=1.5, mscale_all_dim=0.5)),
    "llama3": LlamaConfig(**ROTARY, **rope("llama3", **LLAMA3)),
    "longrope": LlamaConfig(**ROTARY, **rope("longrope", **LONGROPE)),
    "mistral": MistralConfig(**ROTARY, sliding_window=7),
    "mistral-no-window": MistralConfig(**ROTARY, sliding_window=None, **rope("linear", factor=2.0)),
    "qwen2": Qwen2Config(**ROTARY, **rope("yarn", **YARN)),
    "qwen2-window": Qwen2Config(**ROTARY, use_sliding_window=True, sliding_window=5, max_window_layers=0, tie_word_embeddings=True),
    "opt": OPTConfig(**SHARED, ffn_dim=48, max_position_embeddings=LENGTH, init_std=0.2, dropout=0.1),
    "opt-untied": OPTConfig(**SHARED, ffn_dim=48, max_position_embeddings=LENGTH, init_std=0.2, tie_word_embeddings=False),
}


def save(folder: Path, config: Any, **options: object) -> Any:
    """A random model of transformers with random biases, saved; in evaluation mode."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder, **options)
    return model


def load(folder: Path, **options: Any) -> Decoder:
    config = read_config(folder)
    model = Decoder(config, LocalAttend(ReferenceKernel()))
    load_pretrained(model, open_pretrained(folder, config), **options)
    return model


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, AttentionMask(Band.causal(model.config.window)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path / "in", MODELS[name])
    ours = load(tmp_path / "in")
    tokens = torch.randint(61, (2, LENGTH))
    labels = torch.randint(61, (2, LENGTH))
    labels[0, 3:9] = -100
    logits = theirs(tokens).logits
    assert logits.std() > 0.05, "logits that say something"
    torch.testing.assert_close(logits_of(ours, tokens), logits, atol=1e-5, rtol=1e-5)
    positions = torch.arange(LENGTH).expand_as(tokens)
    loss = ours(tokens, positions, AttentionMask(Band.causal(ours.config.window)), labels)
    cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    names = hugging_face_names(ours.config)
    assert set(names.values()) == set(gradients)
    for own, parameter in ours.named_parameters():
        expected = gradients[names[own]]
        unit = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(
            parameter.grad, expected, atol=2e-5 * unit, rtol=1e-4, msg=lambda text, own=own: f"{own}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_is_written_back(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path / "in", MODELS[name])
    ours = load(tmp_path / "in")
    options: dict[str, Any] = {"tokenizer_model": None, "bos": 1, "eos": 2, "dtype": torch.float32, "warn": [].append}
    write_folder(tmp_path / "out", ours.config, ours.named_parameters(), **options)
    assert read_config(tmp_path / "out") == ours.config
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens = torch.randint(61, (1, LENGTH))
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_old_names_of_rope_are_read(tmp_path: Path) -> None:
    """As transformers 4 wrote them."""
    save(tmp_path / "in", MODELS["llama3"])
    wanted = read_config(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    content = json.loads(path.read_text())
    given = content.pop("rope_parameters")
    content["rope_theta"] = given.pop("rope_theta")
    for key in ("rope_type", "type"):
        path.write_text(json.dumps(content | {"rope_scaling": given | {key: "llama3"}}))
        assert read_config(tmp_path / "in") == wanted


def test_what_yarns_authors_noted_is_passed_over(tmp_path: Path) -> None:
    """As in Yarn-Llama-2-7b-128k."""
    save(tmp_path / "in", MODELS["yarn"])
    wanted = read_config(tmp_path / "in")
    given = wanted.rope_scaling
    scaling = {"factor": 2.5, "original_max_position_embeddings": 16, "type": "yarn", "finetuned": True}
    edit(tmp_path / "in", rope_parameters="DELETE", rope_theta=wanted.rope_theta, rope_scaling=scaling)
    assert given == Yarn(2.5, 16)
    assert read_config(tmp_path / "in") == wanted


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("kinds", [None, ["full_attention"] * 2, ["sliding_attention"] * 2])
def test_a_window_in_all_layers_or_in_none(first: int, kinds: list[str] | None, tmp_path: Path) -> None:
    """Layers are what transformers makes of them: of layer_types, else of max_window_layers."""
    given = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": first, "layer_types": kinds}
    theirs = Qwen2Config(**ROTARY, **given)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, layer_types="DELETE" if kinds is None else kinds)
    if len(set(theirs.layer_types)) > 1:
        with pytest.raises(CheckpointError, match=r"max_window_layers: .* some layers only is not implemented; 1 of 2 have none"):
            read_config(tmp_path)
    else:
        assert read_config(tmp_path).window == (5 if theirs.layer_types[0] == "sliding_attention" else None)


def test_shards_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longtrain.models import pretrained

    save(tmp_path / "one", MODELS["llama"])
    save(tmp_path / "many", MODELS["llama"], max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one = load(tmp_path / "one")
    opened: list[Path] = []
    real = pretrained.safe_open

    @contextmanager
    def counting(path: Path, **options: Any):
        opened.append(path)
        with real(path, **options) as handle:
            yield handle
        opened.remove(path)

    most = 0

    def gathered(parameter: Tensor):
        nonlocal most
        most = max(most, len(opened))
        return torch.no_grad()

    monkeypatch.setattr(pretrained, "safe_open", counting)
    many = load(tmp_path / "many", gathered=gathered)
    assert most == 1
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_other_ranks_only_take_part(tmp_path: Path) -> None:
    save(tmp_path / "in", MODELS["opt"], max_shard_size="10KB")
    order: list[list[int]] = []
    for reads in (True, False):
        config = read_config(tmp_path / "in")
        model = Decoder(config, LocalAttend(ReferenceKernel()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        index = {id(p): i for i, p in enumerate(model.parameters())}
        seen: list[int] = []
        load_pretrained(
            model,
            open_pretrained(tmp_path / "in", config),
            lambda p, seen=seen, index=index: seen.append(index[id(p)]) or torch.no_grad(),
            reads=reads,
        )
        order.append(seen)
        assert all((p == 7).all() for p in model.parameters()) != reads
    assert order[0] == order[1]
    assert sorted(order[0]) == list(range(len(order[0])))


def test_low_precision_is_rounded_once(tmp_path: Path) -> None:
    save(tmp_path / "in", MODELS["llama"])
    config = read_config(tmp_path / "in")
    model = Decoder(config, LocalAttend(ReferenceKernel())).bfloat16()
    load_pretrained(model, open_pretrained(tmp_path / "in", config))
    exact = load(tmp_path / "in")
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(model.parameters(), exact.parameters(), strict=True))


@pytest.mark.parametrize("extend", ["interpolate", "random"])
def test_learned_positions_are_extended(extend: str, tmp_path: Path) -> None:
    from dataclasses import replace

    save(tmp_path / "in", MODELS["opt"])
    stored = read_config(tmp_path / "in")
    config = replace(stored, max_positions=100)
    weights = open_pretrained(tmp_path / "in", config)
    model = Decoder(config, LocalAttend(ReferenceKernel()))
    with pytest.raises(CheckpointError, match="40 learned positions cannot become 100"):
        load_pretrained(model, weights)
    load_pretrained(model, weights, seed=5, extend=extend)
    rows = load_file(tmp_path / "in" / "model.safetensors")["model.decoder.embed_positions.weight"]
    found = model.get_parameter("positions.weight").detach()
    assert found.shape == (102, 32)
    if extend == "random":
        assert torch.equal(found[:42], rows)
        assert torch.equal(found[42:], initial_value(config, 5, "positions.weight", (102, 32))[42:])
    else:
        assert torch.equal(found[:2], rows[:2])
        torch.testing.assert_close(found[[2, 101]], rows[[2, 41]])
        at = 50 * 39 / 99
        expected = torch.lerp(rows[2 + int(at)], rows[3 + int(at)], at % 1)
        torch.testing.assert_close(found[52], expected, atol=1e-4, rtol=1e-4)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "DELETE"}))


CONFIGS = [
    ("llama", {"model_type": "bert"}, "model_type 'bert' is not implemented; there are: llama, mistral, qwen2, opt"),
    ("llama", {"attention_bias": True}, "attention_bias: True is not implemented, only False"),
    ("llama", {"mlp_bias": True}, "mlp_bias: True is not implemented"),
    ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not implemented; there are: silu, gelu, gelu_pytorch_tanh"),
    ("llama", {"hidden_act": None}, "hidden_act: None is not implemented"),
    ("qwen2", {"hidden_act": ["gelu"]}, "hidden_act: ['gelu'] is not implemented"),
    ("llama", {"hidden_size": "32"}, "hidden_size: expected a whole number, found '32'"),
    ("llama", {"hidden_size": "DELETE"}, "hidden_size: expected a whole number, found None"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads: must be at least 1"),
    ("llama", {"num_key_value_heads": 3}, "model.kv_heads 3 does not divide"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
    ("llama", {"rope_parameters": {"rope_type": "magic", "rope_theta": 1.0}}, "rope_type 'magic' is not implemented; there are: "),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate: False is not implemented"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "model.rope_scaling.factor: linear needs it"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2, "mrope_section": [1]}}, "mrope_section: linear has no such"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor: expected a number, found '2'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: layers of different kinds"),
    ("qwen2-window", {"max_window_layers": 1, "layer_types": "DELETE"}, "max_window_layers: a sliding window in some layers only"),
    ("qwen2-window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: layers of different kinds"),
    (
        "qwen2-window",
        {"use_sliding_window": False},
        "layer_types: 'sliding_attention' is not implemented without use_sliding_window",
    ),
    (
        "llama",
        {"layer_types": ["sliding_attention"] * 2},
        "layer_types: 'sliding_attention' is not implemented, only 'full_attention'",
    ),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: 16 is not implemented, only 32"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: False is not implemented"),
    ("opt", {"activation_function": "gelu"}, "activation_function: 'gelu' is not implemented"),
    ("opt", {"enable_bias": False}, "enable_bias: False is not implemented"),
    ("opt", {"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 32"),
]


@pytest.mark.parametrize(("name", "changes", "message"), CONFIGS)
def test_unsupported_configurations_are_refused_by_name(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    save(tmp_path / "in", MODELS[name])
    edit(tmp_path / "in", **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_config(tmp_path / "in")
    assert str(tmp_path / "in") in str(caught.value)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    for content, message in (
        ("{", "cannot be read as JSON"),
        ("[1]", "expected a JSON object"),
        ("\xff", "cannot be read as JSON"),
    ):
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"is a run of longtrain, .*`longtrain export RUN --out FOLDER"):
        read_config(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        read_config(tmp_path / "empty")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_of(folder: Path, name: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    content = {"weight_map": {"model.norm.weight": name} if isinstance(name, str) else name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


NORM = "model.norm.weight"
BROKEN: dict[str, Callable[[Path], None]] = {
    "1 tensors are missing, model.norm.weight first": lambda f: change_tensors(f, lambda t: t.pop(NORM)),
    "1 tensors belong to no parameter of a llama decoder, extra": lambda f: change_tensors(
        f, lambda t: t.update(extra=torch.ones(1))
    ),
    "tensor model.norm.weight has shape (3,), its config.json wants (32,)": lambda f: change_tensors(
        f, lambda t: t.update({NORM: torch.ones(3)})
    ),
    "tensor model.norm.weight is of type I8": lambda f: change_tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
    "holds pytorch_model.bin, a pickle, which can hold code and is not opened here; write its tensors": pickled,
    "holds neither model.safetensors nor": lambda f: (f / "model.safetensors").unlink(),
    "cannot be read as safetensors": lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100),
    "is not an index of safetensors files": lambda f: index_of(f, 3),
    "names '../model.safetensors', which is no safetensors file of this folder": lambda f: index_of(f, "../model.safetensors"),
    "1 of 1 weight files are missing, other.safetensors first": lambda f: index_of(f, "other.safetensors"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_weights_are_refused_by_name(message: str, tmp_path: Path) -> None:
    save(tmp_path / "in", MODELS["llama"])
    BROKEN[message](tmp_path / "in")
    config = read_config(tmp_path / "in")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_pretrained(tmp_path / "in", config)


def test_of_two_sets_of_weights_the_one_is_taken_that_transformers_takes(tmp_path: Path) -> None:
    save(tmp_path / "in", MODELS["llama"])
    whole = (tmp_path / "in" / "model.safetensors").read_bytes()
    index_of(tmp_path / "in", "other.safetensors")
    (tmp_path / "in" / "model.safetensors").write_bytes(whole)
    weights = open_pretrained(tmp_path / "in", read_config(tmp_path / "in"))
    assert [file.name for file in weights.files] == ["model.safetensors"]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "in", MODELS["llama"])
    path = tmp_path / "in" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
        open_pretrained(tmp_path / "in", read_config(tmp_path / "in"))


@pytest.mark.parametrize(("number", "dtype"), [(float("nan"), torch.float32), (float("-inf"), torch.float32), (1e6, torch.float16)])
def test_a_number_that_is_not_finite(number: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Not in the file, or not in what is trained."""
    save(tmp_path / "in", MODELS["llama"])
    change_tensors(tmp_path / "in", lambda t: t["model.norm.weight"][3:4].fill_(number))
    config = read_config(tmp_path / "in")
    decoder = Decoder(config, LocalAttend(ReferenceKernel())).to(dtype)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor model.norm.weight holds .* not finite in {dtype}"):
        load_pretrained(decoder, open_pretrained(tmp_path / "in", config))


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in", MODELS["llama"])
    config = read_config(tmp_path / "in")

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("longtrain.models.pretrained.read_config", lambda _: config)
        patch.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: Permission denied; see to its permissions"):
            open_pretrained(tmp_path / "in", config)


def test_what_old_files_hold_besides(tmp_path: Path) -> None:
    """Frequencies, a copy of a tied head, names without the prefix of the whole model."""
    save(tmp_path / "in", MODELS["llama-tied"])
    clean = load(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "old")
    change_tensors(
        tmp_path / "old",
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
            }
        ),
    )
    for a, b in zip(clean.parameters(), load(tmp_path / "old").parameters(), strict=True):
        assert torch.equal(a, b)
    change_tensors(tmp_path / "old", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path / "old")
    save(tmp_path / "opt", MODELS["opt"])
    whole = load(tmp_path / "opt")
    tensors = load_file(tmp_path / "opt" / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "opt" / "model.safetensors")
    for a, b in zip(whole.parameters(), load(tmp_path / "opt").parameters(), strict=True):
        assert torch.equal(a, b)
