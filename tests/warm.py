"""What the ranks of tests are forked from has imported: all that training needs. Imported by nothing but that server."""

import os

# DeepSpeed chooses when it is imported; ranks on GPUs are not forked
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import longtrain.evaluate.held_out
import longtrain.train.run  # noqa: F401
