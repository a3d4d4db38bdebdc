"""Broken recipes, like those of bad_recipes.py: keys of DeepSpeed's own that cannot be passed on."""

REASONS = (
    ("gradient_allreduce_op: sum", "the loss is scaled once, to the mean over all tokens of a step"),
    ("seq_parallel_communication_data_type: bf16", "gradients are summed in fp32"),
    ("curriculum_learning: {enabled: true}", "the sequences of a step follow from the seed alone"),
    ("data_efficiency: {enabled: true}", "the sequences of a step follow from the seed alone"),
    ("compression_training: {layer_reduction: {enabled: true}}", "weights are trained as they are"),
    ("zero_optimization: {zenflow: {topk_ratio: 0.1}}", "it updates some weights later than others"),
    (
        "zero_optimization: {parameter_alignment: true}",
        "checkpoints find the ranges of a parameter by the order of the model",
    ),
    (
        "zero_optimization: {compute_grad_norm: false}",
        "the norm of each step is reported, and decides whether it is skipped",
    ),
    (
        "zero_optimization: {stage3_allgather_sequential: true}",
        "parameters are shared out as they are made, before DeepSpeed reads it",
    ),
    (
        "zero_optimization: {offload_optimizer: {ratio: 0.5}}",
        "zero.offload moves all of the optimizer state, or none",
    ),
)
DECIDED = (
    ("csv_monitor: {enabled: true}", "tracking"),
    ("amp: {enabled: true}", "training.precision"),
    ("autotuning: {enabled: true}", "training.batch_size and training.micro_batch_size"),
    ("compile: {deepcompile: true}", "training.fused"),
    ("elasticity: {enabled: true}", "parallel"),
    ("zero_optimization: {elastic_checkpoint: true}", "checkpoint"),
    ("vocabulary_size: 64", "model.vocab_size"),
)


def _key(line: str) -> str:
    """The dotted name of the first leaf."""
    words = [word.strip("{} ") for word in line.split(":")]
    return ".".join(words[:-1])


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
        "  stage: 1",
        f"  stage: 1\n  deepspeed:\n    {line}",
        f"29: zero.deepspeed.{_key(line)}: cannot be passed on: {reason}; delete it",
    )
    for line, reason in REASONS
]
DEEPSPEED += [
    (
        "  stage: 1",
        f"  stage: 1\n  deepspeed:\n    {line}",
        f"29: zero.deepspeed.{_key(line)}: {field} decides it; delete it, and set that",
    )
    for line, field in DECIDED
]
DEEPSPEED += [
    ("  stage: 1", f"  stage: 1\n  deepspeed:\n    {line}", f"29: zero.deepspeed.{message}")
    for line, message in (
        ("log_level: verbose", "log_level: expected one of debug, info, warning, error, critical, found 'verbose'"),
        ("comms_logger: {enabled: 1}", "comms_logger.enabled: expected true or false, found 1"),
        ("comms_logger: {prof_ops: all_reduce}", "comms_logger.prof_ops: expected a list of text, found 'all_reduce'"),
        ("comms_logger: {verbos: true}", "comms_logger.verbos: unknown key; did you mean 'comms_logger.verbose'?"),
        (
            "comms_logger: {xyz: true}",
            "comms_logger.xyz: unknown key; there are: comms_logger.enabled, comms_logger.verbose, comms_logger.prof_all, "
            "comms_logger.prof_ops, comms_logger.debug",
        ),
        ("flops_profiler: {profile_step: 0}", "flops_profiler.profile_step: expected a whole number of at least 1, found 0"),
        (
            "flops_profiler: {recompute_fwd_factor: 2}",
            "flops_profiler.recompute_fwd_factor: expected a number from 0 to 1, found 2",
        ),
        (
            "flops_profiler: {output_file: /etc/x}",
            "flops_profiler.output_file: /etc is of the operating system; choose a folder for this run alone; found '/etc/x'",
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
