"""The errors a user can cause. The command line prints the message of any of them and exits with 2, without a traceback."""


class LongtrainError(Exception):
    """Base of every refusal: one message that names the file, line or field and says what to do.

    Where a field of the recipe is to blame the message begins with its dotted name, and the command line puts file and line, or the
    override, before it (`recipe.load.Written`).
    """


class RecipeError(LongtrainError):
    """A recipe, or an override of one, that cannot be read as it stands."""


class PlanError(LongtrainError):
    """A recipe that is well formed but cannot run here: ranks, shapes, device or kernels do not fit."""


class DataError(LongtrainError):
    """A corpus, token shard or tokenizer that is missing, damaged or not the one expected."""


class CheckpointError(LongtrainError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class TrainingError(LongtrainError):
    """A run that must not go on as it is; the message names the checkpoint to go back to."""


class KernelError(LongtrainError):
    """No attention kernel can do what is asked; the message holds every kernel's reasons."""


class LaunchError(LongtrainError):
    """Processes, devices or the process group could not be set up."""
