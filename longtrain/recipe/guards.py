"""The part of a recipe that says what is done about what goes wrong in training."""

from enum import StrEnum

from pydantic import Field

from longtrain.recipe.section import Int, Section


class SpikeAction(StrEnum):
    REPORT = "report"
    SKIP = "skip"


class SkipAction(StrEnum):
    STOP = "stop"
    ROLL_BACK = "roll_back"


class GuardsSection(Section):
    """What is done about loss spikes, many bad steps in a row, and ranks that are stuck."""

    spike_deviations: float | None = Field(
        default=6.0,
        gt=0,
        description="Standard deviations above the mean of recent losses from which a step's loss is a spike; null: none is.",
    )
    spike_window: Int = Field(
        default=100,
        ge=2,
        description="Steps that the mean and deviation of recent losses reach back, and before which nothing is called a spike.",
    )
    on_spike: SpikeAction = Field(
        default=SpikeAction.REPORT,
        strict=False,
        description="What a spike leads to: report (a warning), skip (also, the step updates nothing, and counts for "
        "training.max_skipped; all ranks then wait for the loss before the end of each backward pass).",
    )
    on_max_skipped: SkipAction = Field(
        default=SkipAction.STOP,
        strict=False,
        description="After training.max_skipped steps in a row without an update: stop, or roll_back (go on from the last good "
        "checkpoint, with the data that comes after the bad steps).",
    )
    max_roll_backs: Int = Field(default=3, ge=1, description="Roll-backs of the whole run, after which it stops.")
    watchdog_seconds: float | None = Field(
        default=1800.0,
        gt=0,
        description="Seconds without a sign of life from any rank after which the stacks of all are written and the job ends; "
        "longer than the backward pass of one micro batch. Four times as long at the start, in the first step and in a "
        "roll-back; with several ranks never longer than 46 minutes, because collectives give up after an hour. null: no watchdog.",
    )
