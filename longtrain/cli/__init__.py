"""Arguments in, exit codes out; each group of commands in a module of its own.

torch and everything built on it takes seconds to import: only inside the functions that need it, so that --help answers at once.
"""

from longtrain.cli.app import app, main, train_main

__all__ = ["app", "main", "train_main"]
