"""A module in the place of wandb."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class FakeWandb(ModuleType):
    """Remembers every run. online: what an online init does before it succeeds."""

    def __init__(self, online: Callable[[], None] = lambda: None) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="fake")
        self.online, self.runs, self.teardowns = online, [], 0

    def setup(self, settings: Any) -> None:
        assert settings.silent, "it would ask for a key"

    def teardown(self) -> None:
        self.teardowns += 1

    def Settings(self, **settings: Any) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(**settings)

    def Artifact(self, name: str, type: str) -> SimpleNamespace:  # noqa: N802
        files: dict[str, str] = {}
        return SimpleNamespace(
            name=name,
            files=files,
            add_file=lambda path, name: files.update({name: Path(path).read_bytes()[:4]}),
            add_reference=lambda uri, name, checksum: files.update({name: uri}),
        )

    def Image(self, path: str) -> str:  # noqa: N802
        return f"image {path}"

    def init(self, *, mode: str, settings: Any, **arguments: Any) -> SimpleNamespace:
        assert settings.init_timeout <= 60
        assert settings.finish_timeout <= 60
        assert settings.x_disable_meta, "it would take SLURM_JWT"
        if mode == "online":
            self.online()
        run = SimpleNamespace(
            arguments=arguments,
            mode=mode,
            logged=[],
            summary={},
            artifacts=[],
            finished=False,
            id=arguments["id"],
            url="https://somewhere/run",
            dir=f"{arguments['dir']}/wandb/{mode}-run/files",
            settings=SimpleNamespace(mode=mode),
            define_metric=lambda *_, **__: None,
        )
        run.log, run.log_artifact = run.logged.append, run.artifacts.append
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run
