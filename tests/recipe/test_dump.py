"""A recipe written out is the same recipe."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.recipe.explain import FIELDS
from longtrain.recipe.guards import GuardsSection, SkipAction, SpikeAction
from longtrain.recipe.load import dump_recipe, load_recipe
from longtrain.recipe.model import (
    ROPE_NUMBERS,
    Extend,
    Family,
    HiddenAct,
    ModelSection,
    PositionsSection,
    RopeKind,
    RopeScalingSection,
)
from longtrain.recipe.parallel import Layout, ParallelSection
from longtrain.recipe.presets import PRESETS
from longtrain.recipe.schema import (
    Activations,
    AttentionSection,
    CheckpointSection,
    DataSection,
    Device,
    EvaluationSection,
    KernelName,
    OptimizerSection,
    Precision,
    Recipe,
    SaveFailure,
    ScheduleKind,
    ScheduleSection,
    TrackingSection,
    TrainingSection,
    Wandb,
)
from longtrain.recipe.zero import Offload, ZeroSection
from tests.recipe.bad_recipes import BASE

TRAPS = [
    "017",
    "1e4",
    "1:30",
    "no",
    "true",
    "null",
    "./~",
    "<<",
    "=",
    "&a",
    "*b",
    "!t",
    "# x",
    "a: b",
    "- a",
    "'",
    '"',
    "{",
    ".inf",
    "é",
    "-",
]
paths = st.sampled_from(TRAPS) | st.text(min_size=1, max_size=20).filter(
    lambda text: text.strip() and text.isprintable() and not text.startswith("~") and ".." not in text
)
labels = paths.filter(lambda text: not set(text) & set("/\\#?%:"))
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(1, 2**40)


@st.composite
def scalings(draw: st.DrawFn, pairs: int) -> RopeScalingSection:
    kind = draw(st.sampled_from(RopeKind))
    needed, optional = ROPE_NUMBERS[kind]
    chosen = needed | {
        name for name in optional - {"mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"} if draw(st.booleans())
    }
    factors = st.lists(positive, min_size=pairs, max_size=pairs).map(tuple)
    values = {"original_length": counts, "factor": st.floats(1, 1e6)} | dict.fromkeys(("short_factor", "long_factor"), factors)
    return RopeScalingSection(kind=kind, **{name: draw(values.get(name, positive)) for name in chosen})


@st.composite
def models(draw: st.DrawFn) -> ModelSection:
    heads, kv_factor = (draw(st.integers(1, 64)) for _ in range(2))
    family = draw(st.sampled_from(Family))
    shared = {
        "init": draw(st.none() | paths),
        "family": family,
        "vocab_size": draw(st.integers(2, 2**20)),
        "hidden_size": heads * kv_factor * 2,
        "layers": draw(st.integers(1, 10_000)),
        "heads": heads * kv_factor,
        "intermediate_size": draw(st.integers(1, 2**24)),
        "max_positions": draw(st.none() | st.integers(1, 2**31 - 1)),
        "tied_embeddings": draw(st.booleans()),
        "init_std": draw(positive),
        "dropout": draw(st.floats(0, 1, exclude_max=True)),
        "attention_dropout": draw(st.floats(0, 1, exclude_max=True)),
    }
    if family is Family.OPT:
        return ModelSection(**shared, positions=PositionsSection(extend=draw(st.sampled_from(Extend))))
    preset = draw(st.none() | st.sampled_from([name for name, fields in PRESETS.items() if fields["family"] == family]))
    head_dim = draw(st.none() | st.just(8))
    return ModelSection(
        **shared,
        preset=preset,
        kv_heads=draw(st.none() | st.just(heads)),
        head_dim=head_dim,
        hidden_act=draw(st.none() | st.sampled_from(HiddenAct)),
        rope_theta=draw(positive),
        norm_eps=draw(positive),
        window=draw(st.none() | counts),
        rope_scaling=draw(scalings((head_dim or 2) // 2)),
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    micro, accumulation, dp = (draw(st.integers(1, 64)) for _ in range(3))
    kind = draw(st.sampled_from(ScheduleKind))
    warmup, decay, more = draw(st.integers(0, 1000)), draw(st.integers(1, 1000)), draw(st.integers(0, 1000))
    precision = draw(st.sampled_from(Precision))
    cp, model = draw(counts | st.sampled_from([1, "auto"])), draw(models())
    activations = draw(st.sampled_from([mode for mode in Activations if mode is not Activations.MINIMAL or cp in (1, "auto")]))
    fused = ["auto", "none", (), ("norm", "loss")] + ([("rotary", "mlp")] if model.family is not Family.OPT else [])
    longest = 2**30
    if model.family is Family.OPT and model.init is not None and model.positions.extend is Extend.REFUSE:
        longest = max(2, model.max_positions or longest)
        model = model.model_copy(update={"max_positions": longest})
    return Recipe(
        name=draw(
            st.sampled_from(["1e4", "017", "no", "null", "12", "1.5"]) | st.from_regex(r"[a-z0-9][a-z0-9._-]*", fullmatch=True)
        ),
        seed=draw(st.integers(0, 2**63 - 1)),
        device=draw(st.sampled_from([Device.AUTO, Device.CUDA])),
        output=draw(st.none() | paths),
        model=model,
        data=DataSection(path=draw(paths)),
        training=TrainingSection(
            sequence_length=draw(st.integers(2, longest)),
            steps=max(1, warmup + decay + more),
            batch_size=micro * accumulation * dp,
            micro_batch_size=micro,
            precision=precision,
            activations=activations,
            max_skipped=draw(counts),
            fused=draw(st.sampled_from(fused)),
        ),
        attention=AttentionSection(kernel=draw(st.sampled_from(KernelName))),
        parallel=ParallelSection(
            dp=draw(st.sampled_from(["auto", dp])),
            cp=cp,
            layout=draw(st.sampled_from(Layout)),
            tokens_per_rank=draw(counts),
        ),
        optimizer=OptimizerSection(
            lr=draw(positive),
            betas=(draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))),
            eps=draw(positive),
            weight_decay=draw(st.floats(0, 1)),
            grad_clip=draw(st.none() | positive),
        ),
        schedule=ScheduleSection(
            kind=kind,
            warmup_steps=warmup,
            decay_steps=decay if kind is ScheduleKind.WSD else None,
            final_ratio=draw(st.floats(0, 1)),
        ),
        zero=ZeroSection(
            stage=draw(st.integers(1, 3)),
            offload=draw(st.sampled_from(Offload)),
            deepspeed=draw(
                st.none() | st.fixed_dictionaries({"zero_optimization": st.fixed_dictionaries({"reduce_bucket_size": counts})})
            ),
        ),
        checkpoint=CheckpointSection(
            every=draw(counts), keep=draw(st.integers(2, 2**40)), on_failure=draw(st.sampled_from(SaveFailure))
        ),
        guards=GuardsSection(
            spike_deviations=draw(st.none() | positive),
            spike_window=draw(st.integers(2, 2**40)),
            on_spike=draw(st.sampled_from(SpikeAction)),
            on_max_skipped=draw(st.sampled_from(SkipAction)),
            max_roll_backs=draw(counts),
            watchdog_seconds=draw(st.none() | positive),
        ),
        evaluation=EvaluationSection(every=draw(st.none() | counts), sequences=draw(counts)),
        tracking=TrackingSection(
            every=draw(counts),
            tensorboard=draw(st.booleans()),
            wandb=draw(st.sampled_from(Wandb)),
            project=draw(labels),
            entity=draw(st.none() | labels),
            group=draw(st.none() | labels),
            tags=tuple(draw(st.lists(labels, max_size=3))),
        ),
    )


@settings(max_examples=150, deadline=None)
@given(recipe=recipes())
def test_dump_and_load_give_back_the_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    assert loaded == recipe
    assert dump_recipe(loaded) == dump_recipe(recipe)


@pytest.mark.parametrize("trap", TRAPS)
def test_text_that_looks_like_something_else_survives_the_dump(write, trap: str) -> None:
    recipe = load_recipe(write(BASE))
    recipe = recipe.model_copy(update={"data": DataSection(path=trap)})
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_dump_holds_every_field(write) -> None:
    text = dump_recipe(load_recipe(write(BASE)))
    for path in FIELDS:
        assert f"{path[-1]}:" in text


def test_dump_is_of_the_meaning_not_of_the_text(write) -> None:
    """So that the digest that checkpoints keep of it stands for the recipe."""
    recipe = load_recipe(write(BASE))
    same = load_recipe(write("# a comment\n" + BASE.replace("lr: 1e-3", "lr: 0.001\n  eps: 1e-8")))
    assert dump_recipe(same) == dump_recipe(recipe)
    assert dump_recipe(load_recipe(write(BASE), ["seed=4"])) != dump_recipe(recipe)
