from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtrain.errors import CheckpointError
from longtrain.models.config_json import read_config
from longtrain.models.convert import HEAD, from_deepspeed, to_safetensors
from longtrain.models.pretrained import open_pretrained
from tests.models.test_pretrained import MODELS, load, save

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


def pickled(folder: Path, name: str = "opt", files: int = 1) -> dict[str, torch.Tensor]:
    """A folder as it was saved before safetensors; its tensors."""
    save(folder, MODELS[name])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    old = {HEAD: embedding} | tensors
    names = list(old)
    parts = [names[i::files] for i in range(files)]
    where = {}
    for i, part in enumerate(parts):
        file = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i}.bin"
        torch.save({name: old[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


@pytest.mark.parametrize("files", [1, 3])
def test_pickled_weights_become_safetensors(tmp_path: Path, files: int) -> None:
    tensors = pickled(tmp_path / "in", files=files)
    assert to_safetensors(tmp_path / "in", tmp_path / "out", shard_bytes=20_000) == tmp_path / "out"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    open_pretrained(tmp_path / "out", read_config(tmp_path / "out"))
    load(tmp_path / "out")


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    tensors = pickled(tmp_path / "in")
    file = tmp_path / "in" / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    to_safetensors(tmp_path / "in", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("files", [1, 2])
def test_tensors_in_one_memory(tmp_path: Path, files: int) -> None:
    """As torch.save leaves them where config.json does not say that the head is tied, and where one is a part of another."""
    tensors = pickled(tmp_path / "in", "llama", files)
    for file in (tmp_path / "in").glob("*.bin"):
        content = torch.load(file, weights_only=True)
        memory = torch.rand(5000)
        views = {name: memory[: tensor.numel()].view(tensor.shape) for name, tensor in content.items()}
        torch.save({name: torch.nn.Parameter(view) for name, view in views.items()}, file)
        tensors |= views
    to_safetensors(tmp_path / "in", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", ["opt", "llama-tied"])
def test_another_head_than_the_tied_one_is_refused(tmp_path: Path, name: str, files: int) -> None:
    pickled(tmp_path / "in", name, files)
    file = next(file for file in (tmp_path / "in").glob("*.bin") if HEAD in torch.load(file, weights_only=True))
    content = torch.load(file, weights_only=True)
    for other in (content[HEAD] + 1, content[HEAD][1:]):
        torch.save(content | {HEAD: other}, file)
        with pytest.raises(CheckpointError, match=rf"^{file}: {HEAD} differs from model\..*, but tie_word_embeddings is true; .*"):
            to_safetensors(tmp_path / "in", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.filterwarnings("ignore:.*(quantize|nested)")
def test_what_is_no_dense_tensor_of_floating_point_is_refused_by_name(tmp_path: Path) -> None:
    pickled(tmp_path / "in")
    file = tmp_path / "in" / "pytorch_model.bin"
    content = torch.load(file, weights_only=True)
    dense = torch.ones(2, 2)
    nested = torch.nested.nested_tensor([dense, dense])
    quantized = torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
    for entry, message in (
        ({7: dense}, r"holds something else than named tensors \(Tensor by the name 7\); save"),
        ({"a": 7}, r"holds something else than named tensors \(int by the name 'a'\); save"),
        ({"a": dense.to("meta")}, "tensor a is not dense .* on meta"),
        ({"a": dense.to_sparse()}, r"tensor a is not dense .*torch\.sparse_coo"),
        ({"a": quantized}, r"tensor a is not dense .*torch\.qint8"),
        ({"a": nested}, "tensor a is not dense .*nested"),
        ({"a": dense.to(torch.complex128)}, r"tensor a is not dense .*torch\.complex128"),
    ):
        torch.save(content | entry, file)
        with pytest.raises(CheckpointError, match=rf"^{file}: {message}.*torch\.save\(model\.state_dict\(\), FILE\)$"):
            to_safetensors(tmp_path / "in", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_of_another_model_are_told_of_the_folder_they_came_from(tmp_path: Path) -> None:
    pickled(tmp_path / "in")
    file = tmp_path / "in" / "pytorch_model.bin"
    content = torch.load(file, weights_only=True)
    name = "model.decoder.embed_tokens.weight"
    cut = content[name][1:].clone()
    for entries, message in (
        (content | {"foo": torch.ones(2)}, "1 tensors belong to no parameter of a opt decoder, foo first"),
        ({name: content[name]}, "[0-9]+ tensors are missing, model.decoder"),
        (content | {name: cut, HEAD: cut}, rf"tensor {name} has shape \(60, 32\)"),
    ):
        torch.save(entries, file)
        with pytest.raises(CheckpointError, match=rf"^{tmp_path / 'in'}: {message}"):
            to_safetensors(tmp_path / "in", tmp_path / "out")
    (saved := tmp_path / "saved").mkdir()
    flat = {"zero_stage": 1, "partition_count": 1, "single_partition_of_fp32_groups": [torch.zeros(4)]}
    torch.save({"optimizer_state_dict": flat}, saved / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"param_shapes": [{"weight": torch.Size([4])}]}, saved / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=rf"^{saved}: [0-9]+ tensors are missing, model.decoder"):
        from_deepspeed(saved, tmp_path / "out", tmp_path / "in")


def test_a_missing_shard_and_a_full_disk_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "in", files=3)
    monkeypatch.setattr("pathlib.Path.write_bytes", _no_space)
    with pytest.raises(CheckpointError, match=r"/out: cannot be written: No space left on device$"):
        to_safetensors(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin: cannot be read: No such file or directory$"):
        to_safetensors(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pickled(tmp_path / "in")
    file = tmp_path / "in" / "pytorch_model.bin"
    whole = file.read_bytes()
    for content, message in (
        (
            pickle.dumps({"a": Evil()}, protocol=2),
            r"pytorch_model\.bin: .* more than tensors: [\w.]*print is never executed here; name",
        ),
        (pickle.dumps({"a": Evil()}), r"pytorch_model\.bin: is damaged or holds more than tensors: copy or fetch it again$"),
        (whole[: len(whole) // 2], r"pytorch_model\.bin: is damaged .*: copy or fetch it again$"),
        (whole[:-1], r"pytorch_model\.bin: is damaged .*: copy or fetch it again$"),
        (b"", r"pytorch_model\.bin: is damaged .*: copy or fetch it again$"),
        (None, "holds neither pytorch_model.bin nor a usable"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            to_safetensors(tmp_path / "in", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert "run" not in capsys.readouterr().out
    torch.save({"model.decoder.embed_tokens.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="tensors are missing"):
        to_safetensors(tmp_path / "in", tmp_path / "out")
    with pytest.raises(CheckpointError, match="in exists"):
        to_safetensors(tmp_path / "in", tmp_path / "in")


def test_the_command(tmp_path: Path) -> None:
    pickled(tmp_path / "in")
    words = [sys.executable, str(SCRIPT), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'out'}\n"), done.stderr
    again = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr
