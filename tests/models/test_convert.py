from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtrain.errors import CheckpointError
from longtrain.models.config_json import read_config
from longtrain.models.convert import to_safetensors
from longtrain.models.pretrained import open_pretrained
from tests.models.test_pretrained import MODELS, load, save

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


def pickled(folder: Path, name: str = "opt", files: int = 1) -> dict[str, torch.Tensor]:
    """A folder as it was saved before safetensors; its tensors."""
    save(folder, MODELS[name])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = tensors | {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"]}
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


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pickled(tmp_path / "in")
    file = tmp_path / "in" / "pytorch_model.bin"
    whole = file.read_bytes()
    for content, message in (
        (pickle.dumps({"a": Evil()}), "holds more than tensors"),
        (whole[: len(whole) // 2], "is damaged"),
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
