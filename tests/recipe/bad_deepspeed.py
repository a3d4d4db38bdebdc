"""Broken recipes, like those of bad_recipes.py: keys of DeepSpeed's own that cannot be passed on."""

DEEPSPEED = [
    ("  stage: 1", f"  stage: 1\n  deepspeed:\n    {lines}", message)
    for lines, message in (
        ("train_batch_size: 8", "29: zero.deepspeed.train_batch_size: training.batch_size decides it; delete it, and set that"),
        ("bf16: {enabled: true}", "29: zero.deepspeed.bf16.enabled: training.precision decides it; delete it, and set that"),
        ("optimizer:\n      type: Adam", "30: zero.deepspeed.optimizer.type: optimizer decides it; delete it, and set that"),
        (
            "zero_optimization:\n      stage: 3",
            "30: zero.deepspeed.zero_optimization.stage: zero.stage decides it; delete it, and set that",
        ),
        (
            "communication_data_type: bf16",
            "29: zero.deepspeed.communication_data_type: cannot be passed on: gradients are summed in fp32, because sums of bf16 "
            "lose what small shards contribute; delete it",
        ),
        (
            "zero_optimization:\n      reduce_buket_size: 8",
            "30: zero.deepspeed.zero_optimization.reduce_buket_size: unknown key; did you mean "
            "'zero_optimization.reduce_bucket_size'?",
        ),
        (
            "zero_optimization:\n      reduce_bucket_size: 5e8",
            "30: zero.deepspeed.zero_optimization.reduce_bucket_size: expected a whole number of at least 1, found 500000000.0",
        ),
        (
            "zero_optimization:\n      overlap_comm: 1",
            "30: zero.deepspeed.zero_optimization.overlap_comm: expected true or false, found 1",
        ),
        (
            "zero_optimization:\n      sub_group_size: 8",
            "30: zero.deepspeed.zero_optimization.sub_group_size: zero.stage 1 does not read it, only 3; delete it",
        ),
        (
            "zero_optimization: {offload_optimizer: {pin_memory: false}}",
            "29: zero.deepspeed.zero_optimization.offload_optimizer.pin_memory: zero.offload none does not read it; delete it, or "
            "set zero.offload to cpu",
        ),
        (
            "steps_per_print: 017",
            "29: zero.deepspeed.steps_per_print: 017 begins with a zero, which YAML may take for octal; drop the zero, or quote it "
            "as text",
        ),
    )
]
DEEPSPEED += [
    (
        "stage: 1",
        "stage: 1\n  deepspeed: 3",
        "28: zero.deepspeed: expected a section of 'key: value' lines or null, found the whole number 3",
    ),
]
