"""Weights of the checkpoint folders that DeepSpeed's save_checkpoint writes: at ZeRO stage 1, 2 or 3 the fp32 master weights.

    FOLDER/latest                                                       the name of the newest step's folder
    FOLDER/global_step123/mp_rank_00_model_states.pt                    names and shapes; at stage 3 zero_pp_rank_0_mp_rank_00_...
    FOLDER/global_step123/[bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt   what rank N has of the weights, as flat tensors

At stage 0 there is mp_rank_00_model_states.pt alone, with the weights that the model computes with, whole, by name. The fp32 ones
of training in bf16 or fp16 are in it without names, as its optimizer wants them, and are not read.

The files are pickles. They are read by torch's weights-only reader, which builds tensors, containers and numbers; the four classes
of DeepSpeed's own that they may hold are replaced by ones that do nothing. DeepSpeed is not needed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtrain.errors import CheckpointError
from longtrain.models.unpickled import unpickled

LATEST = "latest"
WHOLE = "mp_rank_00_model_states.pt"
"""Names and shapes of the parameters, or all of the model where ZeRO did not share it out."""
LARGEST = 2**62
"""Elements beyond which a count in a file is not one."""

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)(?:_\d+)?_model_states\.pt")
_ELSEWHERE = re.compile(r"(?:layer_|expp_|bf16_expp_).*\.pt")
"""Layers of a pipeline, and experts."""


class _Inert:
    """Stands for a class of DeepSpeed's whose content is not needed."""

    def __new__(cls, *arguments: object) -> _Inert:
        return object.__new__(cls)


class _Stage(int):
    """Stands for DeepSpeed's enumeration of ZeRO stages."""


_STAND_INS = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class DeepSpeedWeights:
    """The weights of one step, found and checked; the tensors are mapped, not read.

    stage: of ZeRO. shapes: by the names that the model had, without `module.`; tied parameters once. groups: the flat tensors of
    every rank that wrote weights, fp32, at stage 0 bf16 or fp16 too. layout: where in them a parameter is, as (group, start).
    """

    step: Path
    stage: int
    shapes: Mapping[str, tuple[int, ...]]
    groups: Sequence[Sequence[Tensor]]
    layout: Mapping[str, tuple[int, int]]

    @property
    def world(self) -> int:
        """Ranks that wrote weights: all of them, or the first one at stage 0."""
        return len(self.groups)

    def read(self, name: str) -> Tensor:
        """One parameter, whole, fp32 on the host."""
        shape, (group, start) = self.shapes[name], self.layout[name]
        count = prod(shape)
        if self.stage == 3:
            part = -(-count // self.world)
            pieces = [piece for rank in self.groups for piece in _cut(rank, start, part)]
        else:
            pieces = list(_cut([rank[group] for rank in self.groups], start, count))
        return torch.cat([torch.empty(0), *pieces])[:count].view(shape)


def is_deepspeed(folder: Path) -> bool:
    """Whether this looks like a folder of DeepSpeed's, or the folder of one of its steps."""
    known = _OPTIMIZER, _MODEL
    return (folder / LATEST).is_file() or any(name.fullmatch(path.name) for path in folder.glob("*.pt") for name in known)


def open_deepspeed(folder: Path) -> DeepSpeedWeights:
    """The weights of the newest step of a folder of DeepSpeed's, or of the step at that path.

    Raises:
        CheckpointError: a file is missing, damaged or holds more than data; the folder is of tensor parallelism, of a pipeline, of
            experts, of frozen parameters or of an unknown layout.
    """
    step = _step_of(folder)
    files = _optimizer_files(step)
    if not files:
        return _unshared(step)
    states = [_optimizer_state(file) for file in files]
    # its bf16 optimizer with fp32 gradients, which there is at stage 1 only, does not name the stage
    stage = states[0].get("zero_stage", 1)
    if not _is_count(stage) or stage not in (1, 2, 3):
        raise CheckpointError(f"{files[0]}: is not of ZeRO stage 1, 2 or 3 as DeepSpeed 0.10 to 0.19 writes it (zero_stage)")
    world = _world(files[0], states[0].get("partition_count"))
    if world != len(files):
        there = f"{len(files)} files *_optim_states.pt are there"
        raise CheckpointError(f"{step}: {there}, but {world} ranks saved it; copy the files of all ranks here")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = [_flat_tensors(file, state, key) for file, state in zip(files, states, strict=True)]
    shapes = _shapes(step / (f"zero_pp_rank_0_{WHOLE}" if stage == 3 else WHOLE))
    paddings = states[0].get("param_alignment_paddings")
    layout = _sharded(shapes, groups, step) if stage == 3 else _consecutive(shapes, paddings, groups, files[0])
    bare = {_bare(name): shape for group in shapes for name, shape in group.items()}
    return DeepSpeedWeights(step, int(stage), bare, groups, {_bare(name): place for name, place in layout.items()})


def _step_of(folder: Path) -> Path:
    latest = folder / LATEST
    if not latest.is_file():
        return folder
    try:
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{latest}: cannot be read: {error.strerror}") from None
    # a name of a file has at most 255 bytes
    if name in ("", "..") or Path(name).name != name or len(name.encode()) > 255:
        raise CheckpointError(f"{latest}: {name[:80]!r} is not the name of a folder beside it")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{latest}: names {name}, which is not there; name the folder of a step that is")
    return folder / name


def _optimizer_files(step: Path) -> list[Path]:
    """The files of all ranks, in their order; none at stage 0. Raises CheckpointError where one is missing, or ranks shared more
    than the data."""
    ranks: dict[int, Path] = {}
    for path in sorted(step.glob("*.pt")):
        found, model = _OPTIMIZER.fullmatch(path.name), _MODEL.fullmatch(path.name)
        if _ELSEWHERE.fullmatch(path.name):
            raise CheckpointError(f"{path}: is of a pipeline or of experts, which are not implemented")
        if (found and int(found[2])) or (model and int(model[1])):
            raise CheckpointError(
                f"{path}: is of tensor parallelism, whose weights are cut in ways that only its own program knows; "
                "export them with that as a Hugging Face folder"
            )
        if found:
            if int(found[1]) in ranks:
                raise CheckpointError(f"{path}: {ranks[int(found[1])].name} is of the same rank; delete the one that is left over")
            ranks[int(found[1])] = path
    absent = [rank for rank in range(len(ranks)) if rank not in ranks]
    if absent:
        raise CheckpointError(f"{step}: the optim_states file of rank {absent[0]} is missing; copy the files of all ranks here")
    return [ranks[rank] for rank in sorted(ranks)]


def _unshared(step: Path) -> DeepSpeedWeights:
    """Stage 0: the weights of a step without optim_states files."""
    file = step / WHOLE
    if not file.is_file():
        raise CheckpointError(
            f"{step}: has no file *_optim_states.pt of ZeRO, and no {WHOLE} of stage 0; name a folder that DeepSpeed's "
            "save_checkpoint wrote, with the files of all ranks"
        )
    content = _load(file)
    if content.get("param_shapes") is not None:
        raise CheckpointError(
            f"{file}: is of ZeRO stage 1 or 2, whose weights are in files *_optim_states.pt, and there is none; copy those of all "
            "ranks here"
        )
    module, buffers = content.get("module"), content.get("buffer_names")
    if not isinstance(module, dict) or not all(isinstance(name, str) for name in module):
        raise CheckpointError(f"{file}: is not a file of DeepSpeed's: field module does not hold tensors by name")
    if buffers is None:
        buffers = []
    if not isinstance(buffers, list) or not all(isinstance(name, str) for name in buffers):
        raise CheckpointError(f"{file}: field buffer_names is not a list of names")
    weights: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in module.items():
        if name in buffers:
            continue
        if not _is_plain(tensor) or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or _bare(name) in weights:
            raise CheckpointError(f"{file}: field module.{name[:80]} is not a parameter in fp32, bf16 or fp16")
        # the second name of a tied parameter is the same bytes of the file
        if tensor.data_ptr() not in places or not tensor.numel():
            weights[_bare(name)] = tensor
            places.add(tensor.data_ptr())
    if not weights:
        raise CheckpointError(f"{file}: field module holds no parameters")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    layout = {name: (number, 0) for number, name in enumerate(weights)}
    return DeepSpeedWeights(step, 0, shapes, [[tensor.flatten() for tensor in weights.values()]], layout)


def _load(file: Path) -> dict[Any, Any]:
    """What a file holds. Raises CheckpointError where it is missing, damaged, or holds anything that would have to be executed."""
    if not file.exists():
        raise CheckpointError(f"{file}: is missing; copy the files of all ranks here")
    with torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
        content = unpickled(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a file of DeepSpeed's: it holds {type(content).__name__}")
    return content


def _optimizer_state(file: Path) -> dict[Any, Any]:
    state = _load(file).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: is not a file of DeepSpeed's: it has no optimizer_state_dict")
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < LARGEST


def _world(file: Path, counts: Any) -> int:
    """The ranks that saved it: one number, or one for every parameter group."""
    found = counts if isinstance(counts, list) else [counts]
    if not found or not all(_is_count(count) for count in found):
        raise CheckpointError(f"{file}: field partition_count does not say how many ranks saved it")
    return max(found)


def _paddings(file: Path, paddings: Any, shapes: list[dict[str, tuple[int, ...]]]) -> list[list[int]]:
    """Elements left free after every parameter, group by group; versions of DeepSpeed that leave none do not say so."""
    if paddings is None:
        return [[0] * len(group) for group in shapes]
    lists = isinstance(paddings, list) and all(isinstance(group, list) for group in paddings)
    if (
        not lists
        or [len(group) for group in paddings] != [len(group) for group in shapes]
        or not all(_is_count(padding) for group in paddings for padding in group)
    ):
        raise CheckpointError(f"{file}: field param_alignment_paddings has not one number for every parameter of param_shapes")
    return paddings


def _flat_tensors(file: Path, state: dict[Any, Any], key: str) -> list[Tensor]:
    groups = state.get(key)
    if not isinstance(groups, list) or not all(_is_flat(tensor) for tensor in groups):
        raise CheckpointError(f"{file}: has no list of flat fp32 tensors {key}")
    return groups


def _is_flat(tensor: Any) -> bool:
    return _is_plain(tensor) and tensor.dtype == torch.float32 and tensor.dim() == 1


def _is_plain(tensor: Any) -> bool:
    known = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return known and tensor.is_contiguous()


def _shapes(file: Path) -> list[dict[str, tuple[int, ...]]]:
    """Name and shape of every trained parameter, group by group."""
    content = _load(file)
    frozen = content.get("frozen_param_shapes")
    if frozen is not None and not (isinstance(frozen, dict) and not frozen):
        raise CheckpointError(
            f"{file}: some parameters were frozen, and only trained ones are read; export it with what trained it"
        )
    wrong = CheckpointError(f"{file}: field param_shapes does not name parameters and their shapes")
    groups = content.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise wrong
    shapes = [(name, shape) for group in groups for name, shape in group.items()]
    if not all(isinstance(name, str) and _is_shape(shape) for name, shape in shapes):
        raise wrong
    if not shapes or len({_bare(name) for name, _ in shapes}) < len(shapes):
        raise wrong
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple | list) and all(_is_count(n) for n in shape) and _is_count(prod(shape))


def _bare(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return re.sub(r"^(module\.)+", "", name)


def _consecutive(
    shapes: list[dict[str, tuple[int, ...]]], paddings: Any, groups: list[list[Tensor]], file: Path
) -> dict[str, tuple[int, int]]:
    """Stages 1 and 2: the parameters of a group one after another, cut into equal parts for the ranks. (group, start) by name.

    file: of the first rank, which has the paddings.
    """
    if any(len(rank) != len(shapes) for rank in groups):
        raise CheckpointError(f"{file.parent}: ranks hold another number of parameter groups than the {len(shapes)} of the model")
    layout: dict[str, tuple[int, int]] = {}
    align = 2 * len(groups)
    for number, (group, after) in enumerate(zip(shapes, _paddings(file, paddings, shapes), strict=True)):
        start = end = 0
        for (name, shape), padding in zip(group.items(), after, strict=True):
            layout[name], end = (number, start), start + prod(shape)
            start = end + padding
        held = sum(rank[number].numel() for rank in groups)
        if -(-start // align) != -(-held // align) or held < end:
            raise CheckpointError(f"{file.parent}: parameter group {number} has {start:,} elements, and the ranks hold {held:,}")
    return layout


def _sharded(shapes: list[dict[str, tuple[int, ...]]], groups: list[list[Tensor]], step: Path) -> dict[str, tuple[int, int]]:
    """Stage 3: of every parameter an equal part on each rank, the last one padded. (0, start on each rank) by name."""
    layout: dict[str, tuple[int, int]] = {}
    start = 0
    for name, shape in itertools.chain.from_iterable(group.items() for group in shapes):
        layout[name] = 0, start
        start += -(-prod(shape) // len(groups))
    for rank, tensors in enumerate(groups):
        held = sum(tensor.numel() for tensor in tensors)
        if held != start:
            raise CheckpointError(f"{step}: rank {rank} holds {held:,} elements of parameters instead of {start:,}")
    return layout


def _cut(tensors: Sequence[Tensor], start: int, count: int) -> Iterator[Tensor]:
    """Views of elements [start, start + count) of flat tensors, taken as one."""
    for tensor in tensors:
        low, high = max(start, 0), min(start + count, tensor.numel())
        if low < high:
            yield tensor[low:high]
        start -= tensor.numel()
