from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from longtrain.errors import LaunchError
from longtrain.parallel import deepspeed
from longtrain.parallel.context import ParallelContext
from longtrain.parallel.deepspeed import Engine, build_model, probe
from longtrain.parallel.zero_config import deepspeed_config
from tests.distributed import run_ranks
from tests.toy import Toy, assemble, initialise, loss_of, make_engine, owned, plain, rows, train

STEPS = range(6)
FP32 = [
    {"stage": stage, "accumulation": accumulation, "grad_clip": clip}
    for stage in range(4)
    for accumulation, clip in ((1, 0.5), (2, None))
]
BF16 = [
    {"stage": stage, "precision": "bf16", "accumulation": a, "offload": offload}
    for stage in (1, 2, 3)
    for a, offload in ((2, "none"), (1 + stage % 2, "cpu"))
]
CASES: list[dict[str, Any]] = [*FP32, *BF16]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_config_says_everything_explicitly(stage: int, precision: str) -> None:
    config = deepspeed_config(stage=stage, precision=precision, offload="cpu", accumulation=3, micro_batch=2, world=4)
    assert config["gradient_clipping"] == 0.0
    assert config["communication_data_type"] == "fp32"
    assert config["train_batch_size"] == 24
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert {"fp16", "bf16"} & set(config) == {precision} - {"fp32"}
    assert not {"mpu", "mesh_param", "sequence_parallel_size", "optimizer", "scheduler"} & set(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 0, "precision": "bf16"}, "stage 0 is for fp32 without offload, not for bf16"),
        ({"stage": 0, "offload": "cpu"}, "stage 0 is for fp32 without offload, .* offload cpu"),
        ({"stage": 1, "precision": "fp8"}, "'fp8' .* not known"),
        ({"stage": 1, "offload": "nvme"}, "'nvme' is not known"),
    ],
)
def test_config_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_config(**arguments)


def _train_all(ctx: ParallelContext) -> list[tuple[list[float], float, Any]]:
    outcomes = []
    for case in CASES:
        engine = make_engine(ctx, **case)
        results = train(engine, STEPS)
        assert not any(result.skipped for result in results)
        outcomes.append(([result.grad_norm for result in results], loss_of(engine), owned(engine)))
        engine.close()
    return outcomes


@pytest.mark.parametrize("world", [1, 2])
def test_training_equals_one_process_of_plain_torch(world: int) -> None:
    """Norms of every step, parameters after all of them, the weights in use; rank 1 of 2 has micro steps without any label."""
    ranks = run_ranks(_train_all, world, timeout=200)
    wrong, _ = plain(range(1, 7), grad_clip=None)
    for index, case in enumerate(CASES):
        low = case.get("precision") == "bf16"
        norms, losses, ranges = zip(*(rank[index] for rank in ranks), strict=True)
        model, true_norms = plain(STEPS, grad_clip=case.get("grad_clip"))
        assert norms[0] == pytest.approx(true_norms, rel=0.03 if low else 2e-5, abs=1e-7), case
        assert len({tuple(n) for n in norms}) == 1, case
        assert len(set(losses)) == 1, case
        with torch.no_grad():
            assert losses[0] == pytest.approx(float(model(*rows(0))), rel=0.02 if low else 1e-5), case
        master = assemble(list(ranges), "master")
        # Adam turns the sign of a tiny bf16 gradient into a whole step, so bf16 parameters are compared as vectors.
        for name, parameter in model.named_parameters():
            error = (master[name] - parameter.detach().flatten()).norm() / parameter.detach().norm()
            assert error < (0.1 if low else 2e-5), (case, name)
        other = dict(wrong.named_parameters())["hidden.weight"].detach().flatten()
        assert (master["hidden.weight"] - other).norm() / other.norm() > (0.01 if low else 1e-3), case


def _refuse(ctx: ParallelContext) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            if (stage, precision) == (0, "bf16"):
                continue
            engine = make_engine(ctx, stage=stage, precision=precision)
            train(engine, range(1))
            before = loss_of(engine)
            # Only the last rank sees the bad loss; all must skip, and go on as if nothing had been.
            bad = float("nan") if ctx.rank == ctx.world - 1 else 1.0
            skipped = train(engine, range(2, 3), poison=lambda step, bad=bad: bad)[0]
            after = loss_of(engine)
            next_step = train(engine, range(2, 3))[0]
            steps = set(engine.adam_steps().values())
            seen[f"{stage} {precision}"] = (skipped, before == after, next_step.skipped, loss_of(engine) != after, steps)
            engine.close()
    engine = make_engine(ctx, stage=1, accumulation=2)
    messages = []
    with pytest.raises(RuntimeError) as early:
        engine.step()
    messages.append(str(early.value))
    for _ in range(2):
        engine.backward(engine.forward(*rows(0)), 1.0)
    with pytest.raises(RuntimeError) as late:
        engine.backward(engine.forward(*rows(0)), 1.0)
    messages.append(str(late.value))
    engine.close()
    seen["messages"] = messages
    seen["probes"] = _probes(ctx)
    seen["builds"] = _builds(ctx)
    return seen


def _probes(ctx: ParallelContext) -> dict[str, str]:
    """What the probe says of right wiring, of wrong scales, and of ranks that diverge."""

    def verdict(stage: int, precision: str = "fp32", **more: Any) -> str:
        config = deepspeed_config(stage=stage, precision=precision, world=ctx.world, **more)
        try:
            probe(ctx, config)
        except LaunchError as error:
            return str(error)
        return "fine"

    verdicts = {}
    for stage in range(4):
        verdicts[f"{stage} accumulated"] = verdict(stage, accumulation=2)
        verdicts[f"{stage} clipped"] = verdict(stage, "fp32" if stage == 0 else "bf16", grad_clip=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "loss_scale", lambda world, accumulation, tokens: accumulation / tokens)
        for stage in range(4):
            verdicts[f"scale {stage}"] = verdict(stage)
    with pytest.MonkeyPatch.context() as patch:
        step = Engine.step

        def diverging(self: Engine) -> Any:
            self.set_lr(0.125 * (ctx.rank + 1))
            return step(self)

        patch.setattr(Engine, "step", diverging)
        verdicts["diverge"] = verdict(0)
    return verdicts


def _builds(ctx: ParallelContext) -> dict[str, Any]:
    """Shapes, dtypes and ties of a bf16 model at every stage, and the loss it starts with."""
    built = {}
    for stage in (1, 2, 3):
        model: Any = build_model(Toy, ctx, stage, torch.bfloat16, initialise)
        tied = model.head.weight is model.embedding.weight
        engine = make_engine(ctx, stage=stage, precision="bf16")
        built[str(stage)] = {
            "tied": tied,
            "table": str((model.table.dtype, model.table.tolist())),
            "dtypes": str({parameter.dtype for parameter in model.parameters()}),
            "default": str(torch.get_default_dtype()),
            "shapes": {name: info.shape for name, info in engine.parameters().items()},
            "loss": loss_of(engine),
        }
        engine.close()
    built["linear"] = nn.functional.linear.__name__
    return built


def test_refusals_probe_and_building_on_two_ranks() -> None:
    for seen in run_ranks(_refuse, 2, timeout=120):
        for stage in range(4):
            for precision in ("fp32", "bf16"):
                if (stage, precision) == (0, "bf16"):
                    continue
                skipped, unchanged, next_skipped, moved, steps = seen[f"{stage} {precision}"]
                assert skipped.skipped, (stage, precision)
                assert skipped.grad_norm == float("inf")
                assert unchanged, (stage, precision)
                assert not next_skipped
                assert moved
                assert steps == {2}
        assert "step needs 2 backward calls, and had 0" in seen["messages"][0]
        assert "backward ran 2 times already" in seen["messages"][1]
        probes = seen["probes"]
        for key, verdict in probes.items():
            if key[0].isdigit():
                assert verdict == "fine", key
        for stage in range(4):
            assert "the gradient is 0.5 times what it should be" in probes[f"scale {stage}"]
        assert "different weights" in probes["diverge"]
        builds = seen["builds"]
        # Not to the bit: the linear that DeepSpeed puts in at stage 3 adds the bias after rounding.
        losses = [builds[stage].pop("loss") for stage in ("1", "2", "3")]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
        assert builds["1"] == builds["2"] == builds["3"]
        tied, table, dtypes, default, shapes = builds["1"].values()
        assert tied
        assert "torch.float32" in table
        assert str(1 + 3 / 256) in table
        assert dtypes == "{torch.bfloat16}"
        assert default == "torch.float32"
        assert shapes["embedding.weight"] == (11, 7)
        assert builds["linear"] == "linear"
