"""recipe + ranks + device -> Plan."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError, PlanError
from longtrain.plan import make_plan
from longtrain.plan.describe import state_bytes
from longtrain.plan.plan import model_config
from longtrain.plan.speed import peak_flops
from longtrain.recipe.load import builtin_recipes, load_recipe
from longtrain.recipe.schema import Recipe
from tests.plan_cases import small, words


def llama_7b(batch_size: int, *overrides: str) -> Recipe:
    """Without a ring."""
    return load_recipe("llama-7b-32k", ("parallel.cp=1", f"training.batch_size={batch_size}", *overrides))


@pytest.mark.parametrize(
    ("world", "dp", "cp", "micro", "accumulation"),
    [(1, 1, 1, 1, 12), (1, 1, 1, 4, 3), (2, 2, 1, 3, 2), (4, 2, 2, 1, 6), (6, 3, 2, 2, 2), (12, 12, 1, 1, 1), (8, 1, 8, 12, 1)],
)
def test_ranks_and_batch(world: int, dp: int, cp: int, micro: int, accumulation: int) -> None:
    recipe = small(f"parallel.cp={cp}", f"training.micro_batch_size={micro}")
    plan = make_plan(recipe, world, "cpu")
    assert (plan.world, plan.dp, plan.cp, plan.accumulation) == (world, dp, cp, accumulation)
    assert plan.dp * plan.cp == plan.world
    assert plan.dp * micro * plan.accumulation == recipe.training.batch_size
    assert plan.tokens_per_step == 12 * 64
    assert plan.deepspeed["gradient_accumulation_steps"] == accumulation
    named = make_plan(small(f"parallel.cp={cp}", f"training.micro_batch_size={micro}", f"parallel.dp={dp}"), world, "cpu")
    assert (named.dp, named.accumulation, named.deepspeed) == (plan.dp, plan.accumulation, plan.deepspeed)


@pytest.mark.parametrize(
    ("overrides", "world", "device", "message"),
    [
        (
            ["parallel.cp=4"],
            6,
            "cpu",
            "parallel.cp: the number of ranks, 6, is not a multiple of cp 4; start a multiple of 4 .*--nproc-per-node 8",
        ),
        (["parallel.cp=4"], 1, "cpu", "--nproc-per-node 4"),
        (["parallel.dp=3", "parallel.cp=2"], 4, "cpu", "dp 3 x cp 2 needs 6 ranks, there are 4"),
        (["parallel.dp=1"], 2, "cpu", "dp 1 x cp 1 needs 1 ranks, there are 2; .*or set parallel.dp to auto"),
        ([], 5, "cpu", "^training.batch_size: 12 is not a multiple of parallel.dp 5 x .*; .* or the number of ranks"),
        (["training.micro_batch_size=4"], 2, "cpu", "not a multiple of parallel.dp 2 x training.micro_batch_size 4"),
        (["device=cuda"], 1, "cpu", "device: the recipe wants cuda, this plan is for cpu"),
        (["device=cpu"], 1, "cuda", "device: the recipe wants cpu"),
        (["training.precision=fp16"], 1, "cpu", "training.precision: fp16 needs a GPU"),
    ],
)
def test_refusals(overrides: list[str], world: int, device: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(small(*overrides), world, device)


def test_allowed_next_to_what_is_refused() -> None:
    assert make_plan(small("training.precision=fp16"), 1, "cuda").dtype is torch.float16
    assert make_plan(small("training.activations=minimal"), 2, "cpu").cp == 1
    assert make_plan(small("training.activations=full", "parallel.cp=2"), 2, "cpu").cp == 2


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("length", "cp"), [(64, 1), (64, 2), (65, 2), (67, 4), (2, 4), (63, 3), (1_048_576, 16)])
def test_padding(layout: str, length: int, cp: int) -> None:
    plan = make_plan(small(f"parallel.layout={layout}", f"parallel.cp={cp}", f"training.sequence_length={length}"), cp, "cpu")
    pieces = 2 * cp if layout == "zigzag" and cp > 1 else cp
    assert plan.padded_length % cp == 0
    assert length <= plan.padded_length < length + pieces
    assert plan.local_length * cp == plan.padded_length
    assert plan.tokens_per_step == 12 * length, "padding is no token"
    assert ("padding" in words(plan)["sequence"]) == (plan.padded_length > length)


@pytest.mark.parametrize(
    ("overrides", "cp", "needed"),
    [
        ([], 1, {"causal"}),
        (["parallel.layout=zigzag"], 4, {"causal", "full"}),
        (["parallel.layout=contiguous"], 2, {"causal", "full"}),
        (["model.window=7"], 1, {"window"}),
    ],
)
def test_kernel_is_chosen_for_the_blocks_of_the_ring(
    overrides: list[str], cp: int, needed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[frozenset[str]] = []
    monkeypatch.setattr(ReferenceKernel, "refuses", lambda self, needs: asked.append(needs.kinds) or [])
    make_plan(small(f"parallel.cp={cp}", *overrides), cp, "cpu")
    assert asked
    assert needed <= asked[-1]
    assert ("full" in asked[-1]) == (cp > 1)


def test_ring_asks_for_fp32_partials(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(ReferenceKernel, "refuses", lambda self, needs: asked.append(needs.fp32_partials) or [])
    for cp in (1, 2):
        make_plan(small(f"parallel.cp={cp}"), cp, "cpu")
    assert asked == [False, True]


def test_kernel_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_plan(small("attention.kernel=reference"), 1, "cpu").kernel.kernel.name == "reference"
    assert words(make_plan(small(), 1, "cpu"))["not reference"].startswith("slower than")
    monkeypatch.setattr(ReferenceKernel, "refuses", lambda self, needs: ["dislikes this"])
    with pytest.raises(KernelError, match=r"reference cannot do this: dislikes this; set attention.kernel to auto"):
        make_plan(small("attention.kernel=reference"), 1, "cpu")
    plan = make_plan(small(), 1, "cpu")
    assert plan.kernel.others["reference"] == words(plan)["not reference"] == "dislikes this"


def test_parameter_counts() -> None:
    assert make_plan(load_recipe("llama-7b-32k"), 2, "cuda").parameters == 6_738_415_616
    assert make_plan(load_recipe("llama-1b-32k"), 2, "cuda").parameters == 1_100_048_384
    block = 24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 40 + 2 * 24
    assert make_plan(small(), 1, "cpu").parameters == 2 * 50 * 24 + 2 * block + 24
    assert make_plan(small("model.tied_embeddings=true"), 1, "cpu").parameters == 50 * 24 + 2 * block + 24


def test_model_config_takes_every_field_of_the_recipe() -> None:
    recipe = small("model.head_dim=10", "model.window=9", "model.tied_embeddings=true", "model.norm_eps=1e-6")
    config = model_config(recipe)
    for field in fields(config):
        if field.name not in ("max_positions", "kv_heads", "head_dim", "rope_scaling"):
            assert getattr(config, field.name) == getattr(recipe.model, field.name)
    assert (config.max_positions, config.kv_heads, config.head_dim) == (64, 2, 10)


@pytest.mark.parametrize(
    ("overrides", "world", "batch_size", "bytes_a_parameter"),
    [
        (["zero.stage=1"], 1, 1, 16),  # 2 weights + 2 gradients + 4 master + 8 moments: 100.4 GiB, as measured
        (["zero.stage=3"], 1, 1, 16),
        (["zero.stage=1"], 8, 8, 2 + 2 + 12 / 8),
        (["zero.stage=2"], 8, 8, 2 + 2 / 8 + 12 / 8),
        (["zero.stage=3"], 8, 8, 16 / 8),
        (["zero.stage=3"], 8, 16, (2 + 4 + 12) / 8),  # sums of two micro batches in fp32
        (["zero.stage=1", "zero.offload=cpu"], 1, 1, 2 + 2),
        (["zero.stage=2", "zero.offload=cpu"], 1, 1, 2),
        (["zero.stage=0", "training.precision=fp32"], 1, 1, 16),
        (["zero.stage=1", "training.precision=fp32"], 1, 1, 20),
    ],
)
def test_state_bytes(overrides: list[str], world: int, batch_size: int, bytes_a_parameter: float) -> None:
    plan = make_plan(llama_7b(batch_size, *overrides), world, "cuda")
    assert state_bytes(plan) == pytest.approx(plan.parameters * bytes_a_parameter)


def test_keys_of_deepspeed_are_laid_over_the_generated_ones() -> None:
    raw = "zero.deepspeed={wall_clock_breakdown: true, zero_optimization: {reduce_bucket_size: 1000, overlap_comm: false}}"
    plain, made = make_plan(small(), 1, "cpu").deepspeed, make_plan(small(raw), 1, "cpu").deepspeed
    assert made["zero_optimization"] == plain["zero_optimization"] | {"reduce_bucket_size": 1000, "overlap_comm": False}
    assert made | {"zero_optimization": 0} == plain | {"wall_clock_breakdown": True, "zero_optimization": 0}


def test_describe() -> None:
    recipe = load_recipe("llama-7b-32k", ["training.sequence_length=32767", "model.window=4096"])
    said = words(make_plan(recipe, 8, "cuda"))
    assert said["ranks"] == "8 on cuda: dp 4 x cp 2 (zigzag ring)"
    assert said["model"].startswith("llama, 6,738,415,616 parameters: 32 layers, hidden 4096, 32 heads / 32 key-value heads of 128")
    assert said["sequence"] == "32,767 tokens (+1 padding), 16,384 on each rank"
    assert said["step"] == "32 sequences = 1,048,544 tokens: 4 dp x 1 a forward x 8 accumulated"
    assert said["steps"] == "20,000 = 20,970,880,000 tokens"
    assert said["model FLOPs"] == "4.79e+16 a step (the whole square: 9.56e+16), where each sequence is one document"
    assert said["learning rate"] == "cosine, peak 0.00015, after 2,000 steps of warmup, down to 1.5e-05"
    assert said["precision"] == "bf16, ZeRO stage 3, optimizer offload none"
    assert said["attention"] == "causal, window 4096"
    assert said["kernel"]
    assert words(make_plan(small(), 1, "cpu"))["ranks"] == "1 on cpu: dp 1 x cp 1 (no ring)"


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["training.precision=bf16"], True),
        (["training.precision=fp16"], True),
        (["training.precision=bf16", "zero.stage=2"], False),
        (["training.precision=bf16", "zero.stage=3"], False),
        (["training.precision=bf16", "training.micro_batch_size=12"], False),
        (["training.precision=fp32"], False),
    ],
)
def test_sums_in_low_precision_are_warned_of(overrides: list[str], warned: bool) -> None:
    said = words(make_plan(small(*overrides), 1, "cuda"))
    assert ("zero.stage 1 sums the gradients of 12 micro batches" in said.get("warning", "")) == warned


def test_builtin_recipes_plan_without_warning() -> None:
    for name in builtin_recipes():
        recipe = load_recipe(name)
        assert "warning" not in words(make_plan(recipe, recipe.meant_world, "cpu")), name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["schedule.kind=constant"], "constant, peak 0.01"),
        (["schedule.kind=linear", "schedule.final_ratio=0"], "linear, peak 0.01, down to 0"),
        (["schedule.kind=wsd", "schedule.decay_steps=4"], "wsd, peak 0.01, down to 0.001 over the last 4 steps"),
    ],
)
def test_learning_rate_in_words(overrides: list[str], line: str) -> None:
    assert words(make_plan(small(*overrides), 1, "cpu"))["learning rate"] == line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM2e", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A6000", 155e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name: str, expected: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == expected
    assert peak_flops(name, torch.float32) is None
