"""Experiment trackers of others: wandb and tensorboard, each in a thread of its own.

The only module that imports wandb, and only where a recipe asks for it. Keys come from wandb's own places, its environment variable
or its login, and are neither read nor written here.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longtrain.errors import PlanError
from longtrain.recipe.schema import TrackingSection, Wandb
from longtrain.train.metrics import Metrics, scalars
from longtrain.train.tracking import Background, Tracker

INIT_TIMEOUT = 30
"""Seconds in which wandb's server has to answer; until then, and afterwards, training goes on."""
FINISH_TIMEOUT = 50
"""Seconds that wandb may upload at the end of a run; less than `tracking.PATIENCE`, so that it can still say what is left."""
TENSORBOARD_FOLDER = "tensorboard"

Say = Callable[[str], None]


def check_installed(tracking: TrackingSection) -> None:
    """Raises PlanError where the recipe asks for a tracker that is not installed."""
    wanted = {"wandb": tracking.wandb is not Wandb.DISABLED, "tensorboard": tracking.tensorboard}
    for package, asked in wanted.items():
        if asked and not _installed(package):
            off = "disabled" if package == "wandb" else "false"
            raise PlanError(
                f"tracking.{package}: {package} is not installed: pip install {package}, or set tracking.{package}={off}"
            )


def choose_id(tracking: TrackingSection, earlier: str | None) -> str | None:
    """The id under which wandb has this run: that of the checkpoint it goes on from, or a new one; None where there is none."""
    if earlier is None and tracking.wandb is not Wandb.DISABLED:
        return secrets.token_hex(6)
    return earlier


def experiment_trackers(
    tracking: TrackingSection, *, name: str, run_id: str | None, folder: Path, done: int, config: Mapping[str, Any], say: Say
) -> list[Tracker]:
    """Those that the recipe asks for. done: steps that were done before. config: what to show beside the curves."""
    trackers: list[Tracker] = []
    if tracking.wandb is not Wandb.DISABLED and run_id is not None:
        # bound here: the thread makes it later
        identity = run_id
        trackers.append(Background("wandb", lambda: WandbRun(tracking, name, identity, folder, config, say), say))
    if tracking.tensorboard:
        trackers.append(Background("tensorboard", lambda: TensorboardLog(folder / TENSORBOARD_FOLDER, done, config), say))
    return trackers


class WandbRun(Tracker):
    """One run of wandb; where the server cannot be reached, or nobody is logged in, an offline one, after one loud line."""

    def __init__(
        self, tracking: TrackingSection, name: str, run_id: str, folder: Path, config: Mapping[str, Any], say: Say
    ) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an optional extra

        self._wandb, self._folder, self._name, self._say = wandb, folder, name, say
        arguments: dict[str, Any] = {
            "id": run_id,
            "name": name,
            "project": tracking.project,
            "entity": tracking.entity,
            "group": tracking.group,
            "tags": list(tracking.tags),
            "config": dict(config),
            "dir": str(folder),
        }
        if tracking.wandb is Wandb.ONLINE:
            try:
                self._run = self._start(arguments, mode="online", resume="allow")
                say(f"wandb: {self._run.url}")
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"WARNING: wandb is not reachable, this run is recorded offline: {reason}")
                # its service holds on to the id of a run that it could not begin
                wandb.teardown()
                self._run = self._start(arguments, mode="offline")
        else:
            self._run = self._start(arguments, mode="offline")
        if self._run.settings.mode != "online":
            say(f"wandb: offline; upload it with: wandb sync {Path(self._run.dir).parent}")
        # a resumed run does some steps again, and wandb's own count only goes up
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _start(self, arguments: Mapping[str, Any], **mode: str) -> Any:
        # silent: a question for a key, on the terminal, would never be answered
        self._wandb.setup(settings=self._wandb.Settings(silent=True))
        settings = self._wandb.Settings(
            silent=True,
            # its thread would share the console with the training loop
            console="off",
            # the address of a repository may hold a password; the commit is in the config
            disable_git=True,
            disable_code=True,
            # it would take every variable that begins with SLURM_, of which SLURM_JWT is a key; the config has the machine
            x_disable_meta=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
        )
        return self._wandb.init(**arguments, **mode, settings=settings, reinit="finish_previous")

    def log(self, metrics: Metrics) -> None:
        self._run.log(scalars(metrics))

    def keep(self, paths: Sequence[Path]) -> None:
        """Files are uploaded, plots shown; folders, such as the exported model, are recorded by where they are."""
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run-folder")
        for path in paths:
            if path.is_file():
                artifact.add_file(str(path), name=path.name)
            else:
                self._run.summary[path.name] = f"{socket.gethostname()}:{path.resolve()}"
                if path.exists():
                    artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
        plots = {f"plots/{path.stem}": self._wandb.Image(str(path)) for path in paths if path.suffix == ".png"}
        if plots:
            self._run.log(plots)
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class TensorboardLog(Tracker):
    """Event files for tensorboard; of steps that a run does again, resumed or rolled back, only the later report is shown."""

    def __init__(self, folder: Path, done: int, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._open(done)
        for key, value in config.items():
            text = "\n".join(f"    {line}" for line in _lines(value))
            self._writer.add_text(key, text, done)

    def _open(self, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1)

    def log(self, metrics: Metrics) -> None:
        for key, value in scalars(metrics).items():
            if key != "step":
                self._writer.add_scalar(key, value, metrics.step)
        self._writer.flush()

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


def _installed(package: str) -> bool:
    try:
        spec = find_spec(package)
    except ValueError:  # an entry of None in sys.modules
        return False
    # no origin: a folder of that name in the current directory, such as wandb itself leaves behind
    return spec is not None and spec.origin is not None


def _lines(value: Any, prefix: str = "") -> list[str]:
    """Nested mappings as dotted lines."""
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _lines(item, f"{prefix}.{key}" if prefix else str(key))]
    return [f"{prefix}: {value}" if prefix else str(value)]
