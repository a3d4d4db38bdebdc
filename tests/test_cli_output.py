"""Where `longtrain train` does not write: one clear message, exit code 2, and everything as it was before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.refusal import Refusal, link, overwrite, refused, rewrite, set_

pytest_plugins = ("tests.desks",)

REFUSALS = {
    "run folder is a file": Refusal(("the run's folder run cannot be made", "run is not a folder"), (), overwrite("run", b"")),
    "run folder below a file": Refusal(("recipe.yaml is not a folder",), set_("output=recipe.yaml/a/b")),
    "run folder is the current one": Refusal(("--set output=.: . is the current folder or one above it",), set_("output=.")),
    "run folder is one above": Refusal(("--set output=../..: ../.. is the current folder or one above it",), set_("output=../..")),
    "run folder is the root": Refusal(("--set output=/: / is the current folder or one above it",), set_("output=/")),
    "run folder is the data": Refusal(("--set output=data: data is in data, which is data",), set_("output=data")),
    "run folder is in the data": Refusal(("--set output=./data/run: data/run is in data",), set_("output=./data/run")),
    "run folder behind a step up": Refusal(
        ("must not go up by '..' after a name; write data/run;",), set_("output=./data/../data/run")
    ),
    "run folder of the system": Refusal(("/etc is of the operating system",), set_("output=/etc/longtrain")),
    "run folder of the system from here": Refusal(
        ("output=../../../../../../../../../../etc/x", "is in /etc, which is of the operating system"),
        set_("output=../../../../../../../../../../etc/x"),
    ),
    "run folder of the system by a link": Refusal(
        ("output=link/x: link/x is in /etc",), set_("output=link/x"), link("link", "/etc")
    ),
    "run folder of the recipe": Refusal(
        ("recipe.yaml:14: output: . is the current folder or one above it",), (), rewrite("output: run", "output: .")
    ),
    "run folder is in the data by a link": Refusal(
        ("--set output=link/run: link/run is in data",), set_("output=link/run"), link("link", "data")
    ),
    "run folder holds a recipe": Refusal(
        ("--set output=mine: mine holds a recipe.yaml that no run wrote and this one would replace",),
        set_("output=mine"),
        overwrite("mine/recipe.yaml", b"precious"),
    ),
    "run folder is a link to nothing": Refusal(("link is not a folder",), set_("output=link"), link("link", "nowhere")),
    "run folder is a link to itself": Refusal(("link is not a folder",), set_("output=link"), link("link", "link")),
    "run folder with a name too long": Refusal((": a path has at most 4095 bytes, 255 between",), set_(f"output={'x' * 300}")),
    "run folder in a home": Refusal(("output=~/x: write the path out, because '~' stands for no folder here",), set_("output=~/x")),
    "run folder with an invisible name": Refusal(("expected a path, without line breaks",), set_('output="a\\0b"')),
    "run named by a path": Refusal(("use lower-case letters",), set_("name=../x")),
    "run named in two lines": Refusal(("use lower-case letters",), set_('name="a\\nb"')),
    "run folder where no folder can be": Refusal(("/proc/",), set_("output=/proc/longtrain/x")),
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_train_refuses_to_write_there(case: Refusal) -> None:
    refused(case, "train", "--recipe", "recipe.yaml")


@pytest.mark.usefixtures("fresh")
def test_unwritable_run_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # the tests may run as root, to whom everything is writable
    def denied(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("longtrain.train.run_folder.tempfile.TemporaryFile", denied)
    message = f"the run's folder run cannot be written: {Path.cwd()}: Permission denied"
    refused(Refusal((message,)), "train", "--recipe", "recipe.yaml")
