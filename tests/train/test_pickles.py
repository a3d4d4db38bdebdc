"""No pickle is ever opened, whatever it is called and wherever it lies: a trap in each, and none springs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from longtrain.data.prepare import prepare
from longtrain.data.workspace import JOURNAL, PLAN
from longtrain.errors import CheckpointError, DataError
from longtrain.files import sha256_of
from longtrain.models.convert import PICKLE, to_safetensors
from longtrain.models.deepspeed_folder import open_deepspeed
from longtrain.train.checkpoint_folder import complete, damage
from longtrain.train.checkpoint_format import FileEntry, read_manifest, write_manifest
from tests.user import CHECKPOINT, command, train

pytest_plugins = ("tests.desks",)

RUN = (
    *("rng_state.pth", "rng_state_0.pth", "random_states_0.pkl", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
    *(
        "training_args.bin",
        "trainer_state.pt",
        "metadata",
        ".metadata",
        "__0_0.distcp",
        "latest",
        "latest_checkpointed_iteration.txt",
    ),
    *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    *("model.pt", "model.bin", "pytorch_model.bin", "checkpoint.pt", "state.pt", "state.pkl", "manifest.pkl", "data.pkl"),
    *(
        "rank-00001.safetensors",
        "rank-00000.pt",
        "model.safetensors",
        "loader.pt",
        "cursor.npy",
        "zero_to_fp32.py.pkl",
        "recipe.pkl",
    ),
)
"""What other programs, or this one if it were made otherwise, call files that they unpickle."""
IMPORT = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.pt", "consolidated.00.pth", ".metadata")
IMPORT += ("tokenizer.json", "generation_config.json")
DATA = ("train-00000.npy", "train.pkl", "cache.arrow.pkl", "tokenizer.pkl", "dataset.pt", "state.json.pkl", "index.pickle")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._path),)


def _traps(sprung: Path) -> dict[str, bytes]:
    """The trap in every way that a pickle is written."""
    trap, found = Trap(sprung), dict[str, bytes]()
    for protocol in range(6):
        found[f"pickle {protocol}"] = pickle.dumps(trap, protocol)
        found[f"state {protocol}"] = pickle.dumps({"step": 3, "model": {"weight": torch.zeros(2)}, "rng": trap}, protocol)
        for kind, zipped in (("zip", True), ("legacy", False)):
            file = io.BytesIO()
            content = {"trap": trap, "embedding.weight": torch.zeros(3)}
            torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            found[f"{kind} {protocol}"] = file.getvalue()
    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    return found | {"npy": file.getvalue()}


@pytest.fixture
def sprung(tmp_path: Path) -> Iterator[Path]:
    """Where the trap would make a folder."""
    path = tmp_path.with_name(tmp_path.name + "-sprung")
    yield path
    assert not path.exists()


@pytest.fixture
def traps(sprung: Path) -> dict[str, bytes]:
    return _traps(sprung)


def test_the_traps_work(tmp_path: Path) -> None:
    """Opened as other programs open them, all of them spring."""
    path = tmp_path / "sprung"
    for kind, content in _traps(path).items():
        with suppress(Exception):
            if kind == "npy":
                np.load(io.BytesIO(content), allow_pickle=True)
            elif kind.split()[0] in ("zip", "legacy"):
                torch.load(io.BytesIO(content), weights_only=False)
            else:
                pickle.loads(content)
        assert path.is_dir(), kind
        path.rmdir()


def _plant(folder: Path, names: tuple[str, ...], traps: dict[str, bytes], turn: int) -> None:
    """Every name gets a trap, with every turn another one; what is there stays."""
    contents = list(traps.values())
    for number, name in enumerate(names):
        if not (folder / name).exists():
            (folder / name).write_bytes(contents[(number + turn) % len(contents)])


TRAPS, FILES = 25, 3
"""Ways to write a pickle, and files of the small checkpoint."""


def turns(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.faults) for turn in range(1, count))])


@pytest.mark.usefixtures("trained")
@turns(TRAPS)
def test_beside_what_a_run_has_written(traps: dict[str, bytes], turn: int) -> None:
    for folder in (Path("run"), Path("run/checkpoints"), *complete(Path("run/checkpoints")), Path("data"), Path()):
        _plant(folder, (*RUN, *DATA), traps, turn)
    for words in (("ls", "run", "--verify"), ("verify", "run"), ("prune", "run", "--keep", "1"), ("export", "run", "--out", "out")):
        said = command("checkpoint", *words)
        assert said.code == 0, said.text
    said = train("--set", "training.steps=4")
    assert said.code == 0, said.text
    assert f"resuming {CHECKPOINT}" in said.text
    said = command("report", "run", "--tokens", "2")
    assert said.code == 0, said.text
    for name in ("tokenizer.json", "generation_config.json"):
        (Path("out") / name).unlink()
    _plant(Path("out"), IMPORT, traps, turn)
    said = train("--set", "model.init=out", "--set", "output=imported", "--until", "1")
    assert said.code == 0, said.text


def _sign(step: Path) -> None:
    """A manifest that vouches for the files as they are."""
    manifest = read_manifest(step)
    files = {name: FileEntry(size=(step / name).stat().st_size, sha256=sha256_of(step / name)) for name in manifest.files}
    write_manifest(step / "manifest.json", manifest.model_copy(update={"files": files}))


@pytest.mark.usefixtures("trained")
def test_in_the_place_of_files_of_a_checkpoint(traps: dict[str, bytes]) -> None:
    """Refused with the name of the file, also where the manifest vouches for it; `--resume auto` takes an earlier one."""
    names = sorted(path.name for path in CHECKPOINT.iterdir())
    for kind, content in traps.items():
        for name in names:
            before = {path: path.read_bytes() for path in CHECKPOINT.iterdir()}
            (CHECKPOINT / name).write_bytes(content)
            for signed in (False, True) if name != "manifest.json" else (False,):
                if signed:
                    _sign(CHECKPOINT)
                assert any(str(CHECKPOINT / name) in reason for reason in damage(CHECKPOINT)), (kind, name, signed)
            for path, old in before.items():
                path.write_bytes(old)


@pytest.mark.usefixtures("trained")
@turns(TRAPS * FILES)
def test_what_commands_say_of_one_in_a_checkpoint(traps: dict[str, bytes], turn: int) -> None:
    names = sorted(path.name for path in CHECKPOINT.iterdir())
    # no common divisor: every trap meets every file
    assert (len(traps), len(names)) == (TRAPS, FILES)
    name, content = names[turn % len(names)], list(traps.values())[turn % len(traps)]
    (CHECKPOINT / name).write_bytes(content)
    for signed in (False, True) if name != "manifest.json" else (False,):
        if signed:
            _sign(CHECKPOINT)
        for words in (
            ("checkpoint", "verify", str(CHECKPOINT)),
            ("export", str(CHECKPOINT), "--out", "out"),
            ("train", "--recipe", "recipe.yaml", "--resume", str(CHECKPOINT)),
        ):
            said = command(*words)
            assert (said.code, name in said.text) == (2, True), (words, said.text)
    said = train()
    assert said.code == 0, said.text
    assert f"WARNING: passed over {CHECKPOINT.name}" in said.text


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", PICKLE])
def test_in_the_place_of_files_of_a_model(traps: dict[str, bytes], name: str) -> None:
    assert command("export", "run", "--out", "whole").code == 0
    for number, content in enumerate(traps.values()):
        folder = Path(f"model-{number}")
        shutil.copytree("whole", folder)
        if name == PICKLE:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
        if name == PICKLE:
            with pytest.raises(
                CheckpointError, match=rf"{folder / PICKLE}: (is damaged or holds more than tensors|holds something)"
            ):
                to_safetensors(folder, Path("converted"))
        said = train("--set", f"model.init={folder}", "--set", "output=imported")
        assert (said.code, name in said.text) == (2, True), said.text
    assert not Path("converted").exists()
    assert not Path("imported").exists()


@pytest.mark.usefixtures("trained")
def test_weights_that_end_early_are_refused_in_words(tmp_path: Path) -> None:
    assert command("export", "run", "--out", "whole").code == 0
    Path("whole/model.safetensors").unlink()
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"weight": torch.zeros(9)}, file, _use_new_zipfile_serialization=zipped)
        for length in (0, 1, len(file.getvalue()) // 2, len(file.getvalue()) - 1):
            (Path("whole") / PICKLE).write_bytes(file.getvalue()[:length])
            with pytest.raises(CheckpointError):
                to_safetensors(Path("whole"), Path("converted"))


def test_in_the_place_of_files_that_deepspeed_wrote(tmp_path: Path, sprung: Path, traps: dict[str, bytes]) -> None:
    """Which are pickles: of these, tensors and numbers are read, and nothing else."""
    step = tmp_path / "saved" / "global_step3"
    step.mkdir(parents=True)
    (tmp_path / "saved" / "latest").write_text(step.name)
    optimizer, model = step / "zero_pp_rank_0_mp_rank_00_optim_states.pt", step / "mp_rank_00_model_states.pt"
    flat = {"zero_stage": 1, "partition_count": 1, "single_partition_of_fp32_groups": [torch.zeros(4)]}
    torch.save({"optimizer_state_dict": flat}, optimizer)
    torch.save({"param_shapes": [{"weight": torch.Size([4])}]}, model)
    assert open_deepspeed(tmp_path / "saved").read("weight").tolist() == [0.0] * 4
    whole = {path: path.read_bytes() for path in (optimizer, model)}
    for protocol in range(2, 6):
        for hidden in ({"loss_scaler": Trap(sprung)}, {"base_optimizer_state": {"state": [Trap(sprung)]}}):
            file = io.BytesIO()
            torch.save({"optimizer_state_dict": flat | hidden}, file, pickle_protocol=protocol)
            traps[f"inside {protocol} {len(traps)}"] = file.getvalue()
    for content in traps.values():
        for path in (optimizer, model):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=path.name):
                open_deepspeed(tmp_path / "saved")
            path.write_bytes(whole[path])
        (tmp_path / "saved" / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match="latest"):
            open_deepspeed(tmp_path / "saved")
        (tmp_path / "saved" / "latest").write_text(step.name)
    optimizer.write_bytes(traps["zip 2"])
    said = command("checkpoint", "import", str(tmp_path / "saved"), "--out", str(tmp_path / "out"))
    assert (said.code, optimizer.name in said.text) == (2, True), said.text
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fresh")
def test_in_the_place_of_prepared_data(traps: dict[str, bytes]) -> None:
    for path in sorted(Path("data").iterdir()):
        before = path.read_bytes()
        for number, content in enumerate(traps.values()):
            # as long as the original, so that its size does not give it away
            path.write_bytes(content[: len(before)].ljust(len(before), b"\0") if number % 2 else content)
            if number % 3 == 0:
                said = train()
                assert (said.code, path.name in said.text) == (2, True), said.text
        path.write_bytes(before)
    assert not Path("run").exists()


@pytest.mark.usefixtures("fresh")
def test_among_text_and_as_a_tokenizer(traps: dict[str, bytes]) -> None:
    quiet: dict[str, Any] = {"vocab_size": 300, "held_out": 0.25, "console": Console(file=io.StringIO())}
    Path("text").mkdir()
    for number in range(20):
        Path(f"text/{number}.txt").write_text(f"{number} and some words of text, again and again " * 20)
    _plant(Path("text"), (*RUN, *DATA, "a.tar", "a.h5"), traps, 0)
    prepare("text", Path("from-text"), **quiet)
    for number, (kind, content) in enumerate(traps.items()):
        for name in ("trap.model", "tokenizer.json", "data.jsonl", "data.jsonl.gz", "data.parquet", "data.txt"):
            folder = Path(f"trap-{number}-{name}")
            folder.mkdir()
            (folder / name).write_bytes(content)
            one = name in ("trap.model", "tokenizer.json")
            source, tokenizer = ("text", str(folder / name)) if one else (str(folder), "data/tokenizer.model")
            with pytest.raises(DataError):
                prepare(source, Path("out"), tokenizer=tokenizer, max_bad=0.0, console=quiet["console"])
        if number % 8 == 0:
            left = Path(f".left-{number}.partial")
            left.mkdir()
            for name in (PLAN, JOURNAL):
                (left / name).write_bytes(content)
            with suppress(DataError):
                prepare("text", Path(f"left-{number}"), **quiet)
        assert not Path("out").exists(), kind


@pytest.mark.usefixtures("fresh")
def test_in_a_dataset_of_the_hub(traps: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for number, suffix in enumerate(("pkl", "pickle", "pt", "pth", "npy", "tar", "arrow", "h5")):
        folder = Path(f"set-{suffix}")
        folder.mkdir()
        (folder / f"train.{suffix}").write_bytes(list(traps.values())[number])
        (folder / f"{folder.name}.py").write_text("import os\nos.mkdir('never')\n")
        (folder / "dataset_infos.json").write_text(json.dumps({}))
        with pytest.raises(DataError):
            prepare(f"hf:{folder.absolute()}", Path("out"), vocab_size=300, console=Console(file=io.StringIO()))
    assert not Path("never").exists()
