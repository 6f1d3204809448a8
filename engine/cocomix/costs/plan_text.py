"""`cocomix plan`: predictions as text, as a table and as JSON."""

import dataclasses

from cocomix.core.config import Config
from cocomix.core.files import write_json
from cocomix.core.flops import parameter_count, training_flops
from cocomix.core.methods import SOFT_TARGETS, doubles_sequence
from cocomix.core.tables import aligned
from cocomix.costs.cluster import load_cluster
from cocomix.costs.planner import Plan, gigabytes, make_job, make_plan, predict, settings_of
from cocomix.teacher.supervision import learns_from, wanted_kinds


def run(config: Config, gpus: list[int], cluster: str, vocab_size: int | None = None, json_file=None) -> None:
    """`cocomix plan`: print the plan of one number of GPUs, or a table with a row for each of several."""
    job = make_job(config, load_cluster(cluster), vocab_size)
    plans = [make_plan(job, number, raise_batch=len(gpus) > 1) for number in gpus]
    if json_file is not None:
        write_json(json_file, {"plans": [as_dict(plan) for plan in plans]})
    print(describe(plans[0]) if len(plans) == 1 else table(plans))


def as_dict(plan: Plan) -> dict:
    """Everything a plan holds, for JSON."""
    job = plan.job
    return {
        "cluster": dataclasses.asdict(job.cluster),
        "gpus": plan.gpus,
        "global_batch": plan.global_batch,
        "parameters": parameter_count(job.shape),
        "student": dataclasses.asdict(job.shape),
        "teacher": None if job.teacher is None else dataclasses.asdict(job.teacher),
        "flops_per_token": training_flops(job.shape, job.teacher),
        "train_tokens": job.config.train.tokens,
        "stages": [_prediction_dict(found) for found in plan.stages],
        "chosen": None if plan.chosen is None else _prediction_dict(plan.chosen),
        "advice": plan.advice,
    }


def _prediction_dict(found):
    return dataclasses.asdict(found) | {"memory_total": found.memory.total}


def _days(days):
    return f"{days:,.1f}" if days >= 1 else f"{days:.2g}"


def describe(plan: Plan) -> str:
    """The plan as text: the job, a table of the stages, the choice and the assumptions."""
    job, cluster = plan.job, plan.job.cluster
    shape, first = job.shape, plan.stages[0].setup
    lines = [
        f"{parameter_count(shape) / 1e6:,.0f}M parameters, {_method(job)}, {job.config.train.precision}; "
        f"{training_flops(shape, job.teacher) / 1e9:.2f} GFLOP a token, forward and backward",
        f"{plan.gpus} x {cluster.name}, {cluster.memory_gb:g} GB each of which {cluster.reserved_gb:g} GB reserved; "
        f"{plan.global_batch:,} windows of {shape.seq_len:,} tokens a step: {first.rounds} x {first.micro_batch} for "
        f"each GPU{', activation checkpointing' if first.checkpointing else ''}",
        "",
        "predicted, for one GPU",
        _stage_table(plan),
        "",
    ]
    if plan.chosen is None:
        return "\n".join([*lines, plan.advice])
    found = plan.chosen
    lines += [
        f"chosen: {settings_of(found)}{' train.offload_optimizer=true' if found.setup.offload else ''}",
        f"  {gigabytes(found.memory.total)} GB a GPU, step {found.step_s * 1e3:,.0f} ms, "
        f"{found.tokens_per_s:,.0f} tokens/s, {_days(found.days)} days for {job.config.train.tokens:.3g} tokens",
        f"assumed: {_rates(job)}; {cluster.link_share:.0%} of the links' rates; of communication that DeepSpeed "
        f"overlaps (by default stage 3 only) {cluster.overlap:.0%} is hidden; no pauses for data, evaluation or saving",
    ]
    return "\n".join(lines)


def _method(job):
    config = job.config
    sources = [
        f"{'cached' if kind.cache_folder(config) else 'online'} {kind.title(config)}" for kind in wanted_kinds(config)
    ]
    distils = ["distillation"] if SOFT_TARGETS in learns_from(config) else []
    residual = ["residual"] if doubles_sequence(job.shape.mixing) and job.shape.concept_residual else []
    residual += [f"every {job.shape.concept_every} tokens"] if job.shape.concept_every > 1 else []
    return ", ".join([f"mixing {job.shape.mixing}", *residual, *distils, *sources])


def _rates(job):
    cluster = job.cluster
    return (
        f"{job.rate / 1e12:g} TFLOP/s in products, {cluster.attention_tflops:g} in attention, "
        f"{cluster.memory_tb_s:g} TB/s"
    )


def _stage_table(plan):
    """One column a stage: memory by part, then work, communication and speed."""
    names = list(dict.fromkeys(name for found in plan.stages for name in found.memory.parts))
    rows = [[f"{name}, GB", *(gigabytes(found.memory.parts.get(name, 0)) for found in plan.stages)] for name in names]
    other = [
        predict(plan.job, dataclasses.replace(found.setup, checkpointing=not found.setup.checkpointing))
        for found in plan.stages
    ]
    switched = "without" if plan.stages[0].setup.checkpointing else "with"
    rows += [
        ["memory, GB", *(gigabytes(found.memory.total) for found in plan.stages)],
        ["fullest at", *(found.memory.moment for found in plan.stages)],
        ["fits", *("not offered" if not found.offered else "yes" if found.fits else "no" for found in plan.stages)],
        [f"memory {switched} checkpointing, GB", *(gigabytes(found.memory.total) for found in other)],
    ]
    if any(found.memory.host for found in plan.stages):
        rows.append(["host memory, GB", *(gigabytes(found.memory.host) for found in plan.stages)])
    rows += [
        [title, *(format(value(found), style) for found in plan.stages)]
        for title, value, style in (
            ("TFLOP a step", lambda f: f.flops / 1e12, ",.1f"),
            ("GB moved a step", lambda f: f.bytes / 1e9, ",.0f"),
            ("all-reduce, GB", lambda f: f.communication.all_reduce / 1e9, ".2f"),
            ("reduce-scatter, GB", lambda f: f.communication.reduce_scatter / 1e9, ".2f"),
            ("all-gather (own part), GB", lambda f: f.communication.all_gather / 1e9, ".3f"),
            ("computing, ms", lambda f: f.compute_s * 1e3, ",.1f"),
            ("communicating, ms", lambda f: f.communication_s * 1e3, ",.1f"),
            ("of it not hidden, ms", lambda f: f.exposed_s * 1e3, ",.1f"),
            ("tokens/s, all GPUs", lambda f: f.tokens_per_s, ",.0f"),
        )
    ]
    rows.append(["days", *(_days(found.days) for found in plan.stages)])
    return "\n".join(aligned([["", *(f"ZeRO {found.setup.stage}" for found in plan.stages)], *rows]))


def table(plans: list[Plan]) -> str:
    """A Markdown table with the choice for each number of GPUs. A batch that had to be raised carries a star."""
    job = plans[0].job
    titles = ("GPUs", "windows a step", "ZeRO", "micro batch", "checkpointing", "GB a GPU", "step", "tokens/s", "days")
    rows = [titles, tuple("---:" for _ in titles)]
    for plan in plans:
        batch = f"{plan.global_batch:,}{'' if plan.global_batch == job.config.train.global_batch else '*'}"
        found = plan.chosen
        if found is None:
            rows.append((f"{plan.gpus:,}", batch, "nothing fits", *("" for _ in titles[3:])))
            continue
        rows.append(
            (
                f"{plan.gpus:,}",
                batch,
                str(found.setup.stage),
                str(found.setup.micro_batch),
                "yes" if found.setup.checkpointing else "no",
                gigabytes(found.memory.total),
                f"{found.step_s * 1e3:,.0f} ms",
                f"{found.tokens_per_s / 1e6:.2f}M",
                _days(found.days),
            )
        )
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    raised = any(plan.global_batch != job.config.train.global_batch for plan in plans)
    note = (
        f"\n\n\\* raised from {job.config.train.global_batch:,}, which does not divide among so many GPUs"
        if raised
        else ""
    )
    return (
        f"Predicted for {job.cluster.name}: {parameter_count(job.shape) / 1e6:,.0f}M parameters, {_method(job)}, "
        f"{job.config.train.precision}, {job.config.train.tokens:.3g} tokens\n\n{text}{note}"
    )
