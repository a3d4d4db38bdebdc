"""Weights out of real checkpoints of DeepSpeed's, and out of nothing that only looks like one."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from longtrain.errors import CheckpointError
from longtrain.models.config_json import read_config
from longtrain.models.convert import from_deepspeed
from longtrain.models.deepspeed_folder import is_deepspeed, open_deepspeed
from longtrain.models.families import hugging_face_names
from longtrain.models.pretrained import open_pretrained
from longtrain.parallel import deepspeed as adapter
from longtrain.parallel.context import ParallelContext
from tests.distributed import run_ranks
from tests.models.deepspeed_folders import MASTER, save_all, save_ours

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one-1": {"stage": 1, "precision": "bf16"},
        "one-2": {"stage": 2, "precision": "bf16"},
        "one-3": {"stage": 3, "precision": "bf16"},
        "one-0": {"stage": 0, "precision": "fp32"},
        "one-0-tied": {"stage": 0, "precision": "fp32", "tied": True},
    },
    2: {
        "two-1": {"stage": 1, "precision": "fp32"},
        "two-1-bf16": {"stage": 1, "precision": "bf16", "tied": True, "data_types": {"grad_accum_dtype": "fp32"}},
        "two-2": {"stage": 2, "precision": "fp32", "round_robin_gradients": True},
        "two-3": {"stage": 3, "precision": "fp32", "sub_group_size": 1000},
        "two-3-tied": {"stage": 3, "precision": "bf16", "tied": True},
        "namespace": {"stage": 1, "precision": "fp32", "client": {"args": argparse.Namespace(lr=1.0)}},
    },
}
GOOD = [name for cases in CASES.values() for name in cases if name != "namespace"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("deepspeed")
    for world, cases in CASES.items():
        run_ranks(save_all, world, str(base), cases)
    return base


@pytest.mark.parametrize("name", GOOD)
def test_master_weights_are_those_that_deepspeed_trained(saved: Path, name: str) -> None:
    weights, master = open_deepspeed(saved / name), load_file(saved / name / MASTER)
    assert weights.world == (1 if name.startswith("one") else 2)
    assert f"-{weights.stage}" in name
    assert weights.step.name == "global_step2"
    assert weights.shapes == {parameter: tuple(value.shape) for parameter, value in master.items()}
    assert all(torch.equal(weights.read(parameter), value) for parameter, value in master.items())
    assert torch.equal(open_deepspeed(weights.step).read("model.norm.weight"), master["model.norm.weight"]), "a step by its path"


@pytest.mark.parametrize("name", GOOD)
def test_a_hugging_face_folder_comes_out(saved: Path, tmp_path: Path, name: str) -> None:
    out = from_deepspeed(saved / name, tmp_path / "out", shard_bytes=9000)
    master, written = load_file(saved / name / MASTER), {}
    for file in out.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == master.keys()
    assert all(torch.equal(written[parameter], value) for parameter, value in master.items())
    open_pretrained(out, read_config(out))
    with pytest.raises(CheckpointError, match="out exists"):
        from_deepspeed(saved / name, out)


def test_a_model_of_ours_gets_hugging_faces_names(tmp_path: Path) -> None:
    run_ranks(save_ours, 1, str(tmp_path / "in"))
    (described := tmp_path / "described").mkdir()
    (tmp_path / "in" / "config.json").rename(described / "config.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json; name the Hugging Face folder .* with --config FOLDER"):
        from_deepspeed(tmp_path / "in", tmp_path / "out")
    out = from_deepspeed(tmp_path / "in", tmp_path / "out", described)
    master, written = load_file(tmp_path / "in" / MASTER), load_file(out / "model.safetensors")
    names = hugging_face_names(read_config(described))
    assert {names[ours] for ours in master} == written.keys()
    assert all(torch.equal(written[names[ours]], value) for ours, value in master.items())


def _save_half(ctx: ParallelContext, folder: str) -> dict[str, Any]:
    """A layer in bf16 with a buffer, a tied parameter and a frozen one, after a step at stage 0: its weights as lists."""
    import deepspeed

    adapter.attach()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    model.register_buffer("table", torch.ones(3, dtype=torch.int64))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    made: tuple[Any, ...] = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=0.1), config=config, dist_init_required=False
    )
    engine = made[0]
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum())
    engine.step()
    engine.save_checkpoint(folder)
    engine.destroy()
    return {name: parameter.tolist() for name, parameter in model.named_parameters()}


def test_half_precision_at_stage_0_is_what_the_model_computes_with(tmp_path: Path) -> None:
    wanted = run_ranks(_save_half, 1, str(tmp_path))[0]
    assert list(wanted) == ["0.weight", "0.bias", "1.bias"]
    weights = open_deepspeed(tmp_path)
    assert weights.stage == 0
    assert {name: weights.read(name).tolist() for name in weights.shapes} == wanted
    assert weights.read("0.weight").dtype == torch.float32
    assert weights.shapes["0.weight"] == (4, 4)


WRONG_WHOLE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no weights": (lambda c: c.pop("module"), "field module does not hold tensors by name"),
    "empty": (lambda c: c["module"].clear(), "field module holds no parameters"),
    "text": (lambda c: c["module"].update(a="b"), r"field module\.a is not a parameter in fp32, bf16 or fp16"),
    "integers": (lambda c: c["module"].update(a=torch.ones(2, dtype=torch.int64)), r"field module\.a is not a parameter"),
    "strides": (lambda c: c["module"].update(a=torch.ones(1).expand(9)), r"field module\.a is not a parameter"),
    "twice": (
        lambda c: c["module"].update({"module.model.norm.weight": torch.ones(32)}),
        r"field module\.module\.model\.norm\.weight is not a parameter",
    ),
    "buffers": (lambda c: c.update(buffer_names=torch.ones(2)), "field buffer_names is not a list of names"),
}


@pytest.mark.parametrize("what", WRONG_WHOLE)
def test_what_is_not_of_stage_0_is_refused(saved: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(saved / "one-0", tmp_path / "in")
    change, message = WRONG_WHOLE[what]
    _edit(folder / "global_step2" / MODEL, change)
    with pytest.raises(CheckpointError, match=rf"{MODEL}: .*{message}"):
        open_deepspeed(folder)


def test_stage_0_is_known_without_the_file_latest(saved: Path, tmp_path: Path) -> None:
    assert is_deepspeed(saved / "one-0" / "global_step2")
    assert from_deepspeed(saved / "one-0" / "global_step2", tmp_path / "out").is_dir()


def test_wrapped_names(saved: Path, tmp_path: Path) -> None:
    def wrap(content: dict[str, Any]) -> None:
        content["param_shapes"] = [{f"module.{name}": shape for name, shape in g.items()} for g in content["param_shapes"]]

    folder = shutil.copytree(saved / "two-1", tmp_path / "in")
    _edit(folder / "global_step2/mp_rank_00_model_states.pt", wrap)
    assert open_deepspeed(folder).shapes == open_deepspeed(saved / "two-1").shapes


def test_the_loss_scaler_of_fp16_is_left_alone(saved: Path, tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def scale(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["loss_scaler"] = DynamicLossScaler(2.0, 1000, 1.0, 2, False)

    folder = shutil.copytree(saved / "two-2", tmp_path / "in")
    _edit(folder / "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", scale)
    assert open_deepspeed(folder).stage == 2


class Evil:
    """Leaves a mark where it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["one-0", "two-1", "two-3"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_pickle_with_code_is_refused_and_not_executed(saved: Path, tmp_path: Path, name: str, bare: bool) -> None:
    files = [path.name for path in (saved / name / "global_step2").glob("*.pt")]
    read = [file for file in files if not file.startswith("zero_pp_rank_1_mp_rank_00_model")]
    assert len(read) == (1 if name == "one-0" else 3)
    for file in read:
        folder, evil = shutil.copytree(saved / name, tmp_path / file), Evil(tmp_path / "executed")
        path = folder / "global_step2" / file
        if bare:
            path.write_bytes(pickle.dumps(evil))
        else:
            _edit(path, lambda content: content.update(more=evil))  # noqa: B023
            with pytest.raises(CheckpointError, match=r"more than tensors.*pathlib\.Path\.touch|getattr"):
                open_deepspeed(folder)
        with pytest.raises(CheckpointError, match=f"{file}: is damaged or holds more than tensors"):
            open_deepspeed(folder)
    assert not (tmp_path / "executed").exists()


def test_objects_beside_the_model_are_refused_by_name(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt: .*argparse\.Namespace is never executed here"):
        open_deepspeed(saved / "namespace")


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def _edited(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda step: _edit(step / file, change)


def _drop_elements(content: dict[str, Any]) -> None:
    groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:-64]


RANK_0, RANK_1, MODEL = (
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt",
)
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "last rank": (lambda s: (s / RANK_1).unlink(), "1 files .* are there, but 2 ranks saved it; copy the files of all ranks"),
    "first rank": (lambda s: (s / RANK_0).unlink(), "the optim_states file of rank 0 is missing"),
    "model": (lambda s: (s / MODEL).unlink(), "mp_rank_00_model_states.pt: is missing"),
    "cut": (lambda s: (s / RANK_1).write_bytes((s / RANK_1).read_bytes()[:5000]), "rank_1_mp_rank_00_optim_states.pt: is damaged"),
    "twice": (lambda s: shutil.copy(s / RANK_0, s / f"bf16_{RANK_0}"), "is of the same rank; delete the one"),
    "tensor parallel": (
        lambda s: shutil.copy(s / MODEL, s / "mp_rank_01_model_states.pt"),
        "mp_rank_01_.*is of tensor parallelism",
    ),
    "pipeline": (lambda s: shutil.copy(s / MODEL, s / "layer_00-model_states.pt"), "is of a pipeline or of experts"),
    "stage": (_edited(RANK_0, lambda c: c["optimizer_state_dict"].update(zero_stage=7)), "is not of ZeRO stage 1, 2 or 3"),
    "foreign": (_edited(RANK_0, lambda c: c.pop("optimizer_state_dict")), "it has no optimizer_state_dict"),
    "list": (lambda s: torch.save([1], s / MODEL), "it holds list"),
    "half": (
        _edited(RANK_1, lambda c: c["optimizer_state_dict"].update(single_partition_of_fp32_groups=[torch.ones(2).half()])),
        "has no list of flat fp32 tensors",
    ),
    "short": (_edited(RANK_1, _drop_elements), r"parameter group 0 has [\d,]+ elements, and the ranks hold [\d,]+"),
    "groups": (_edited(MODEL, lambda c: c["param_shapes"].pop()), "another number of parameter groups"),
    "shapes": (_edited(MODEL, lambda c: c.update(param_shapes=[{"a": "b"}])), "param_shapes does not name parameters"),
    "frozen": (_edited(MODEL, lambda c: c.update(frozen_param_shapes={"a": torch.Size([1])})), "some parameters were frozen"),
    "latest": (lambda s: (s.parent / "latest").write_text("../elsewhere"), "is not the name of a folder beside it"),
    "no step": (lambda s: (s.parent / "latest").write_text("global_step9"), "names global_step9, which is not there"),
    "climbing": (lambda s: (s.parent / "latest").write_text(".."), "is not the name of a folder beside it"),
    "endless name": (lambda s: (s.parent / "latest").write_text("g" * 5000), "is not the name of a folder beside it"),
    "endless rank": (
        lambda s: shutil.copy(s / RANK_0, s / f"zero_pp_rank_{'9' * 30}_mp_rank_00_optim_states.pt"),
        "the optim_states file of rank 2 is missing",
    ),
    "ranks": (
        _edited(RANK_0, lambda c: c["optimizer_state_dict"].update(partition_count=[None, "2"])),
        f"{RANK_0}: field partition_count does not say how many ranks",
    ),
    "paddings": (
        _edited(RANK_0, lambda c: c["optimizer_state_dict"].update(param_alignment_paddings=[[0], None])),
        f"{RANK_0}: field param_alignment_paddings has not one number for every parameter",
    ),
    "negative": (_edited(MODEL, lambda c: c["param_shapes"][0].update(a=(-1,))), f"{MODEL}: field param_shapes does not name"),
    "no optimizer": (
        lambda s: [(s / file).unlink() for file in (RANK_0, RANK_1)],
        f"{MODEL}: is of ZeRO stage 1 or 2, whose weights are in files .*, and there is none; copy those of all ranks",
    ),
    "nothing": (lambda s: [path.unlink() for path in s.glob("*.pt")], "has no file .*_optim_states.pt of ZeRO"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_whole_or_not_known_is_refused(saved: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(saved / "two-1", tmp_path / "in")
    change, message = WRONG[what]
    change(folder / "global_step2")
    with pytest.raises(CheckpointError, match=message):
        from_deepspeed(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_init_names_the_script(saved: Path) -> None:
    (saved / "two-2" / MASTER).rename(saved / "two-2" / "master.other")
    with pytest.raises(CheckpointError, match=r"holds a checkpoint of DeepSpeed's; .* scripts/convert_checkpoint\.py"):
        open_pretrained(saved / "two-2", read_config(saved / "two-2"))
    (saved / "two-2" / "master.other").rename(saved / "two-2" / MASTER)


def test_the_command(saved: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(saved / "two-3"), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'out'}\n"), done.stderr
    words = [sys.executable, str(SCRIPT), str(tmp_path), "--out", str(tmp_path / "new"), "--config", str(tmp_path)]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --config goes with a folder that DeepSpeed wrote")


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=3)
    | st.integers(-3, 3)
    | st.sampled_from([2**62, -(2**70)])
    | st.builds(lambda: 10**5000)  # more digits than Python writes
    | st.builds(torch.ones, st.lists(st.integers(0, 3), max_size=2).map(tuple))
    | st.sampled_from([torch.ones(4).to_sparse(), torch.ones(4, device="meta"), torch.ones(1).expand(9), torch.Size([2, 2])]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(0, 2), inner, max_size=2),
    max_leaves=4,
)


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested containers."""
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list | tuple) else ()
    for key, value in inner:
        yield from _places(value, (*path, key))


def _with(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at one place."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = _with(content[path[0]], path[1:], value)
    return tuple(copy) if isinstance(content, tuple) else copy


@cache
def _content(file: Path) -> tuple[Any, list[tuple[Any, ...]]]:
    """What a file holds, and the places in what is read of it."""
    content = torch.load(file, weights_only=False)
    read = {"optimizer_state_dict", "param_shapes", "frozen_param_shapes"}
    if content.get("param_shapes", ()) is None:
        read |= {"module", "buffer_names"}
    unread = {"base_optimizer_state", "loss_scaler", "ds_config", "group_paddings"}
    return content, [p for p in _places(content) if p[0] in read and not unread & set(p) and p[:2].count(p[0]) == 1]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["one-0", "two-1", "two-1-bf16", "two-3"])
def test_whatever_stands_in_a_file_there_is_no_traceback(saved: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    step = saved / name / "global_step2"
    file = data.draw(st.sampled_from(sorted(step.glob("*.pt"))))
    content, places = _content(file)
    folder = tmp_path / name
    if not folder.exists():
        shutil.copytree(step, folder)
    torch.save(_with(content, data.draw(st.sampled_from(places)), data.draw(ODD)), folder / file.name)
    with contextlib.suppress(CheckpointError):
        weights = open_deepspeed(folder)
        for parameter in weights.shapes:
            weights.read(parameter)
    shutil.copy(file, folder / file.name)
