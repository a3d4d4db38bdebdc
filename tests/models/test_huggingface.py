from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from longtrain.attention import AttentionMask, Band
from longtrain.errors import CheckpointError, DataError
from longtrain.models import Decoder, ModelConfig, hugging_face_names
from longtrain.models.huggingface import appearing_whole, write_folder
from longtrain.models.rope import Dynamic, Linear, LongRope, RopeScaling, Yarn
from longtrain.parallel.context import ParallelContext
from tests.distributed import start_ranks


def export(folder: Path, model: Decoder, **options: object) -> None:
    settings = {"tokenizer_model": None, "bos": 1, "eos": 2, "dtype": torch.float32, **options}
    write_folder(folder, model.config, model.named_parameters(), **settings)  # type: ignore[arg-type]


def test_logits_and_gradients_equal_transformers(
    config: ModelConfig, build: Callable[..., Decoder], plain_batch: Callable, tmp_path: Path
) -> None:
    model = build(config)
    export(tmp_path / "out", model)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    llama = "MistralForCausalLM" if config.window or config.heads == 3 else "LlamaForCausalLM"
    assert type(theirs).__name__ == {"llama": llama, "qwen2": "Qwen2ForCausalLM", "opt": "OPTForCausalLM"}[config.family]
    tokens, positions, mask, labels = plain_batch(config)
    logits = theirs(tokens).logits
    torch.testing.assert_close(model(tokens, positions, mask), logits, atol=1e-5, rtol=1e-5)
    loss = model(tokens, positions, mask, labels)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    names = hugging_face_names(config)
    assert set(names.values()) == set(gradients)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[names[name]], atol=2e-4, rtol=1e-4, msg=name)


def test_window_changes_the_logits(build: Callable[..., Decoder], small: ModelConfig, tmp_path: Path) -> None:
    """The comparison above would pass with both windows ignored."""
    tokens = torch.randint(small.vocab_size, (1, 17))
    logits = []
    for window in (None, 5, 6):
        export(tmp_path / str(window), build(replace(small, window=window)))
        logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(window))(tokens).logits)
    for window, windowed in ((5, logits[1]), (6, logits[2])):
        same = (windowed == logits[0]).all(-1)[0]
        close = torch.isclose(windowed, logits[0], atol=1e-5).all(-1)[0]
        assert close[:window].all()
        assert not same[window:].any()


def test_rope_theta_reaches_old_and_new_transformers(small: ModelConfig, build: Callable, tmp_path: Path) -> None:
    export(tmp_path / "out", build(replace(small, rope_theta=12345.0)))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["rope_theta"] == 12345.0
    assert stored["dtype"] == stored["torch_dtype"] == "float32"
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 12345.0


SHORT, LONG = (1.0, 1.1, 1.2, 1.3), (1.0, 1.5, 2.0, 4.0)
SCALINGS: list[tuple[RopeScaling | None, str | None]] = [
    (None, None),
    (Linear(2.5), None),
    (Yarn(2.5, 16), None),
    (Dynamic(2.5, 16, 16), None),
    (LongRope(2.5, 16, SHORT, LONG, 16), None),
    (Dynamic(2.5, 16, 40), "raises rope_theta less than training did, up to 16 tokens not at all"),
    (LongRope(2.5, 16, SHORT, LONG, 40), "short_factor, which this training never did"),
]


@pytest.mark.parametrize(("scaling", "remark"), SCALINGS)
def test_scalings_that_differ_for_shorter_inputs_are_named(
    scaling: RopeScaling | None, remark: str | None, small: ModelConfig, build: Callable[..., Decoder], tmp_path: Path
) -> None:
    """And what the remark advises makes them equal at every length."""
    longest = getattr(scaling, "length", 40)
    config = replace(small, rope_scaling=scaling, rope_theta=500.0, max_positions=longest)
    model, said = build(config), []
    export(tmp_path / "out", model, warn=said.append)
    assert len(said) == (remark is not None)
    assert remark is None or remark in said[0]
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())

    def same(length: int) -> bool:
        tokens = torch.arange(length)[None] * 7 % small.vocab_size
        positions = torch.arange(length)[None]
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        return torch.allclose(found, model(tokens, positions, AttentionMask(Band.causal(None))), atol=1e-5)

    assert same(longest)
    assert same(12) == (remark is None)
    if isinstance(scaling, Dynamic) and remark is not None:
        ratio, dim = scaling.length / scaling.original_length, small.head_dim
        theta = 500.0 * (scaling.factor * ratio - (scaling.factor - 1)) ** (dim / (dim - 2))
        del content["rope_scaling"]
        content |= {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    elif remark is not None:
        for where in ("rope_scaling", "rope_parameters"):
            content[where]["short_factor"] = content[where]["long_factor"]
    path.write_text(json.dumps(content))
    assert same(12)
    assert same(longest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_load_as_one_file_does(small: ModelConfig, build: Callable, tmp_path: Path, dtype: torch.dtype) -> None:
    model = build(small)
    export(tmp_path / "one", model, dtype=dtype)
    export(tmp_path / "many", model, dtype=dtype, shard_bytes=10_000)
    assert (tmp_path / "one" / "model.safetensors").exists()
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 15_000 for shard in shards)
    assert shards[-1].name == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) and one[name].dtype == dtype for name in one)
    ours = dict(model.named_parameters())
    assert all(torch.equal(one[theirs], ours[name].to(dtype)) for name, theirs in hugging_face_names(small).items())


def test_only_one_shard_is_held(small: ModelConfig, build: Callable, tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def tensors():
        nonlocal most
        for name, parameter in model.named_parameters():
            copy = parameter.detach().clone()
            alive.append(weakref.ref(copy.untyped_storage()))
            yield name, copy
            del copy
            most = max(most, sum(s.nbytes() for s in (r() for r in alive) if s is not None))

    model = build(small)
    settings = {"tokenizer_model": None, "bos": 1, "eos": 2, "dtype": torch.float32, "shard_bytes": 20_000}
    write_folder(tmp_path / "out", small, tensors(), **settings)  # type: ignore[arg-type]
    largest = max(p.nbytes for p in model.parameters())
    assert most <= 20_000 + 2 * largest


def test_a_failed_export_leaves_nothing(small: ModelConfig, build: Callable, tmp_path: Path) -> None:
    tensors = list(build(small).named_parameters())
    cases = {
        "missing, norm.weight": [t for t in tensors if t[0] != "norm.weight"],
        "given twice": [*tensors, tensors[0]],
        "none of this name": [*tensors, ("other", torch.zeros(1))],
        r"shape \(1,\)": [(name, torch.zeros(1)) for name, _ in tensors],
    }
    settings = {"tokenizer_model": None, "bos": 1, "eos": 2, "dtype": torch.float32}
    for message, given in cases.items():
        with pytest.raises(CheckpointError, match=message):
            write_folder(tmp_path / "out", small, given, **settings)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        write_folder(tmp_path / "out", small, tensors, **settings)  # type: ignore[arg-type]


def _write_for_ever(ctx: ParallelContext, out: str) -> None:
    with appearing_whole(Path(out)) as part:
        (part / "weights").write_bytes(b"half")
        time.sleep(3600)


def test_what_a_killed_export_left_is_cleared_and_a_living_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start_ranks(_write_for_ever, 1, str(out)) as ranks:
        end = time.monotonic() + 60
        while not (begun := [path for path in tmp_path.rglob("weights") if path.read_bytes() == b"half"]):
            assert ranks.running()
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(CheckpointError, match=r"/out: another process writes it; "), appearing_whole(out):
            pass
        assert [path.read_bytes() for path in begun] == [b"half"]
        ranks.kill([0])
    with appearing_whole(out) as part:
        assert not list(part.iterdir())
        (part / "config.json").write_text("whole")
    assert sorted(tmp_path.rglob("*")) == [out, out / "config.json"]


def test_without_locks_nothing_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unable)
    out = tmp_path / "out"
    with appearing_whole(out) as part:
        (part / "weights").write_bytes(b"half")
        with pytest.raises(CheckpointError, match=rf"{part}: another process writes it, or a killed one"), appearing_whole(out):
            pass
    assert sorted(tmp_path.rglob("*")) == [out, out / "weights"]


@pytest.mark.parametrize("call", ["pathlib.Path.write_bytes", "os.fsync", "longtrain.models.huggingface.save_file"])
def test_what_the_disk_refuses_is_told_of_the_folder(
    call: str, small: ModelConfig, build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(BPE({"a": 0, "<s>": 1, "</s>": 2}, [])).save(str(tokenizer))
    monkeypatch.setattr(call, full)
    with pytest.raises(CheckpointError, match=r"/out: cannot be written: No space left on device$"):
        export(tmp_path / "out", build(small), tokenizer_model=tokenizer)
    assert list(tmp_path.iterdir()) == [tokenizer]


def test_what_cannot_be_read_is_told_by_its_name(small: ModelConfig, build: Callable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/in\.json: cannot be read"):
        export(tmp_path / "out", build(small), tokenizer_model=tmp_path / "in.json")
    assert not list(tmp_path.iterdir())
