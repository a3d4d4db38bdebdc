"""wandb and tensorboard: what they are told, under which id, and that training goes on whatever they do."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from longtrain.errors import PlanError
from longtrain.recipe.schema import TrackingSection, Wandb
from longtrain.train import experiment
from longtrain.train.checkpoint_format import read_state
from longtrain.train.experiment import TensorboardLog, check_installed, choose_id, experiment_trackers
from longtrain.train.metrics import Metrics
from tests.fake_wandb import FakeWandb
from tests.user import REPOSITORY, Said, train

pytest_plugins = ("tests.desks",)

REPORT = Metrics(1, 2.5, 2.25, 1e-3, float("inf"), 100, 2000.0, 1000.0, 0.05, None, None, 0.25, [(0, 15, 3.0, 9), (16, 31, 2.0, 9)])
SECRET = "0123456789abcdef" * 2


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def tracked(tracking: TrackingSection, folder: Path, *reports: Metrics, keep: tuple[Path, ...] = ()) -> list[str]:
    """What people are told of a run with these reports."""
    said: list[str] = []
    trackers = experiment_trackers(
        tracking, name="tiny", run_id=choose_id(tracking, None), folder=folder, done=0, config={"recipe": {"a": 1}}, say=said.append
    )
    for tracker in trackers:
        for report in reports:
            tracker.log(report)
        tracker.say("saved something")
        tracker.keep(keep)
        tracker.close()
    return said


def test_disabled_is_nothing(tmp_path: Path) -> None:
    assert tracked(TrackingSection(), tmp_path, REPORT) == []
    assert list(tmp_path.iterdir()) == []


def test_online(wandb: FakeWandb, tmp_path: Path) -> None:
    tracking = TrackingSection(wandb=Wandb.ONLINE, project="p", entity="e", group="g", tags=("a", "b"))
    said = tracked(tracking, tmp_path, REPORT, replace(REPORT, step=2, eval_by_position=None))
    assert said == ["wandb: https://somewhere/run"]
    (run,) = wandb.runs
    assert run.finished
    assert run.mode == "online"
    given = {key: run.arguments[key] for key in ("name", "project", "entity", "group", "tags", "config", "dir", "resume")}
    assert given == {
        "name": "tiny",
        "project": "p",
        "entity": "e",
        "group": "g",
        "tags": ["a", "b"],
        "config": {"recipe": {"a": 1}},
        "dir": str(tmp_path),
        "resume": "allow",
    }
    assert run.logged[0]["step"] == 1
    assert run.logged[0]["loss"] == 2.5
    assert run.logged[0]["eval_by_position/0000016-0000031"] == 2.0
    assert not {"grad_norm", "mfu_full"} & run.logged[0].keys(), "neither inf nor null"


def test_what_is_kept(wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"\x89PNG plot")
    (tmp_path / "huggingface").mkdir()
    paths = (tmp_path / "loss.png", tmp_path / "huggingface")
    tracked(TrackingSection(wandb=Wandb.OFFLINE), tmp_path, REPORT, keep=paths)
    (run,) = wandb.runs
    assert run.artifacts[0].files == {"loss.png": b"\x89PNG", "huggingface": (tmp_path / "huggingface").as_uri()}
    assert run.summary["huggingface"].endswith(str(tmp_path / "huggingface"))
    assert {"plots/loss": f"image {tmp_path / 'loss.png'}"} in run.logged


def test_unreachable_goes_on_offline(wandb: FakeWandb, tmp_path: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("no answer\nand a long story")

    wandb.online = refuse
    said = tracked(TrackingSection(wandb=Wandb.ONLINE), tmp_path, REPORT)
    assert said[0] == "WARNING: wandb is not reachable, this run is recorded offline: no answer"
    assert said[1].startswith("wandb: offline; upload it with: wandb sync ")
    (run,) = wandb.runs
    assert run.mode == "offline"
    assert "resume" not in run.arguments
    assert wandb.teardowns == 1, "the service would say that the id is in use"
    assert run.logged[0]["loss"] == 2.5


def test_training_does_not_wait_for_a_slow_server(wandb: FakeWandb, tmp_path: Path) -> None:
    answered = threading.Event()
    wandb.online = lambda: bool(answered.wait(30)) and None
    tracking = TrackingSection(wandb=Wandb.ONLINE)
    begin = time.monotonic()
    (tracker,) = experiment_trackers(tracking, name="t", run_id="x", folder=tmp_path, done=0, config={}, say=lambda _: None)
    for step in range(100):
        tracker.log(replace(REPORT, step=step))
    assert time.monotonic() - begin < 5
    answered.set()
    tracker.close()
    assert [row["step"] for row in wandb.runs[0].logged] == list(range(100))


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(3), KeyboardInterrupt()])
def test_a_crash_in_the_tracker_is_one_line(wandb: FakeWandb, tmp_path: Path, error: BaseException) -> None:
    made = wandb.init

    def init(**arguments: Any) -> SimpleNamespace:
        run = made(**arguments)

        def log(row: dict[str, Any]) -> None:
            raise error

        run.log = log
        return run

    wandb.init = init  # type: ignore[method-assign]
    said = tracked(TrackingSection(wandb=Wandb.OFFLINE), tmp_path, REPORT, REPORT)
    assert len(said) == 2
    assert said[1].startswith(f"WARNING: wandb failed ({type(error).__name__}")
    assert "training is not affected" in said[1]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_refused_before_training(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    check_installed(TrackingSection())
    asked = TrackingSection(wandb=Wandb.OFFLINE) if package == "wandb" else TrackingSection(tensorboard=True)
    with pytest.raises(PlanError, match=rf"tracking\.{package}: .* is not installed: pip install {package}, or set"):
        check_installed(asked)


def test_a_folder_called_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nosuchpackage").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not experiment._installed("nosuchpackage")
    assert experiment._installed("torch")


def test_ids() -> None:
    on = TrackingSection(wandb=Wandb.OFFLINE)
    assert choose_id(on, "abc") == "abc"
    assert choose_id(TrackingSection(), None) is None
    assert choose_id(TrackingSection(), "abc") == "abc", "kept while wandb is switched off"
    assert choose_id(on, None) != choose_id(on, None)


@pytest.mark.usefixtures("fresh")
def test_a_resumed_run_goes_on_under_its_id(wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)

    def trained(*words: str) -> Said:
        said = train("--set", "tracking.wandb=online", *words)
        assert said.code == 0, said.text
        return said

    trained("--until", "1")
    assert train("--set", "tracking.wandb=disabled", "--until", "2").code == 0
    said = trained()
    first, last = wandb.runs
    assert last.id == first.id
    assert read_state(Path("run/checkpoints/step-00000003")).tracker == first.id
    assert [row["step"] for row in last.logged if "step" in row] == [3]
    config = last.arguments["config"]
    assert config["recipe"]["training"]["steps"] == 3
    assert config["plan"]["world"] == 1
    assert config["environment"]["versions"]["torch"]
    assert {"recipe.yaml", "plan.txt", "loss.png", "checkpoints"} <= last.artifacts[0].files.keys()
    assert last.summary["huggingface"].endswith("run/huggingface"), "where it will be: it is written when the run has ended"
    written = [path.read_bytes() for path in Path("run").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in written)
    assert SECRET not in said.text + json.dumps(config)
    # from the same checkpoint under another name: another run
    trained("--resume", "run/checkpoints/step-00000003", "--set", "output=other", "--set", "training.steps=4")
    assert wandb.runs[-1].id != first.id


@pytest.mark.usefixtures("fresh")
def test_wandb_does_not_change_what_is_learnt(wandb: FakeWandb) -> None:
    for output, mode in (("with", "offline"), ("without", "disabled")):
        assert train("--set", f"output={output}", "--set", f"tracking.wandb={mode}").code == 0
    weights = [Path(name, "checkpoints/step-00000003/rank-00000.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


class FakeWriter:
    made: list[FakeWriter] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: dict[str, str] = {}
        FakeWriter.made.append(self)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.scalars.append((key, value, step))

    def add_text(self, key: str, text: str, step: int) -> None:
        self.texts[key] = text

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert tracked(TrackingSection(tensorboard=True), tmp_path, REPORT) == []
    writer = FakeWriter.made.pop()
    assert writer.folder == str(tmp_path / "tensorboard")
    assert writer.purge_step == 1
    assert ("loss", 2.5, 1) in writer.scalars
    assert ("eval_by_position/0000000-0000015", 3.0, 1) in writer.scalars
    assert not {"step", "grad_norm"} & {key for key, _, _ in writer.scalars}
    assert writer.texts == {"recipe": "    a: 1"}


def test_tensorboard_of_a_run_that_goes_on_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    (tracker,) = experiment_trackers(
        TrackingSection(tensorboard=True), name="t", run_id=None, folder=tmp_path, done=3, config={}, say=lambda _: None
    )
    tracker.log(replace(REPORT, step=4))
    tracker.go_back(2)
    tracker.log(replace(REPORT, step=3))
    tracker.close()
    before, after = (FakeWriter.made.pop(0) for _ in range(2))
    assert (before.purge_step, after.purge_step) == (4, 3)
    assert {step for _, _, step in before.scalars} == {4}
    assert {step for _, _, step in after.scalars} == {3}


def test_real_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert tracked(TrackingSection(tensorboard=True), tmp_path, REPORT) == []
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 2.5)]


def test_real_tensorboard_of_a_run_that_goes_back(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorboardLog(tmp_path, 0, {})
    for step in (1, 2, 3):
        tracker.log(replace(REPORT, step=step))
    tracker.go_back(1)
    tracker.log(replace(REPORT, step=2, loss=9.0))
    tracker.close()
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 2.5), (2, 9.0)]


@pytest.mark.parametrize("mode", [Wandb.OFFLINE, Wandb.ONLINE])
def test_real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Wandb) -> None:
    """Online: at a server that is not there."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(experiment, "INIT_TIMEOUT", 3)
    monkeypatch.setenv("WANDB_API_KEY", "local-" + SECRET + "01234567")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "loss.png").write_bytes((REPOSITORY / "docs" / "quickstart-loss.png").read_bytes())
    try:
        said = tracked(TrackingSection(wandb=mode), tmp_path, REPORT, keep=(tmp_path / "loss.png", tmp_path))
    finally:
        wandb.teardown()
    assert len(said) == (1 if mode is Wandb.OFFLINE else 2), said
    assert said[-1].startswith("wandb: offline; upload it with: wandb sync ")
    record = Path(said[-1].split()[-1])
    assert list(record.glob("run-*.wandb"))
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
