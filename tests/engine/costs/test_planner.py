"""The planner's memory and communication against measurements, and what it chooses and says."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import plan_helpers
import pytest
import torch
from run_helpers import environment

from cocomix.cli import main
from cocomix.core.config import Config, load_config
from cocomix.core.errors import CocomixError
from cocomix.core.flops import frozen_side, parameter_count
from cocomix.core.shapes import StudentShape, TeacherShape
from cocomix.costs.cluster import Cluster, known_clusters, load_cluster
from cocomix.costs.footprint import CHUNK_BYTES, Setup, footprint
from cocomix.costs.plan_text import describe
from cocomix.costs.planner import (
    Communication,
    communication,
    communication_time,
    make_job,
    make_plan,
    predict,
    step_flops,
)
from cocomix_kernels.common import chunking

CONFIGS = Path(__file__).parents[3] / "configs/openwebtext"
ZERO_3 = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def paper_job(size="69m", cluster="h100", *overrides):
    return make_job(load_config(CONFIGS / f"{size}.yaml", list(overrides)), load_cluster(cluster))


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("mixing", "seq_len", "rows", "rounds", "checkpointing", "more"),
    [
        ("none", 128, 8, 1, False, {}),
        ("add", 128, 8, 1, False, {}),
        ("interleave", 128, 8, 1, False, {}),  # activations
        ("interleave", 128, 8, 2, False, {}),
        ("interleave", 128, 8, 1, True, {}),
        ("interleave", 16, 1, 1, False, {"n_embd": 256, "concept_dim": 4096}),  # weights and optimizer
        ("interleave", 64, 2, 1, False, {"vocab_size": 12000}),  # the language-model head
        ("interleave", 128, 4, 1, False, {"vocab_size": 12000}),  # and with it in several chunks
        ("add", 256, 4, 1, False, {"concept_dim": 16384, "vocab_size": 500}),  # the concept head
        ("predict", 256, 4, 1, False, {"concept_dim": 16384, "vocab_size": 500}),
        ("pause", 128, 8, 1, False, {}),
        ("pause", 128, 8, 1, True, {}),
        ("interleave", 128, 8, 1, False, {"concept_every": 2}),
        ("interleave", 128, 8, 1, False, {"concept_every": 4, "concept_residual": True}),
        ("pause", 128, 8, 1, True, {"concept_every": 4}),
    ],
)
def test_memory_of_one_process_is_what_a_step_holds(mixing, seq_len, rows, rounds, checkpointing, more):
    student = plan_helpers.shape(mixing, seq_len, **more)
    model = plan_helpers.build(student)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # as training does

    def step():
        for _ in range(rounds):
            model(**plan_helpers.micro_batch(student, rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held += sum(p.nbytes for p in model.parameters())
    setup = Setup(
        stage=0, gpus=1, micro_batch=rows, rounds=rounds, bf16=False, checkpointing=checkpointing, device="cpu"
    )
    predicted = footprint(student, plan_helpers.N_HEAD, setup)
    assert predicted.total == pytest.approx(held + plan_helpers.peak_above_start(step), rel=0.05)
    assert predicted.parts["weights"] == 4 * parameter_count(student)


def test_chunks_are_those_of_the_operations():
    assert CHUNK_BYTES == {"cpu": chunking.CHUNK_BYTES["cpu"], "cuda": chunking.CHUNK_BYTES["triton"]}


@pytest.mark.parametrize("bf16", [False, True])
def test_partitions_shrink_with_the_stage_and_the_number_of_gpus(bf16):
    student, count = plan_helpers.shape("interleave"), parameter_count(plan_helpers.shape("interleave"))

    def parts(stage, gpus, **more):
        return footprint(student, 4, Setup(stage, gpus, 2, 1, bf16, bucket=1000, kept_whole=0, **more)).parts

    assert parts(0, 8)["optimizer"] == 8 * count
    for stage in (1, 2, 3):
        assert parts(stage, 8)["optimizer"] == count
        assert parts(stage, 8)["masters"] == count / 2
        assert parts(stage, 8, offload=True).keys().isdisjoint({"optimizer", "masters"})
    assert parts(2, 8)["weights"] == 8 * parts(3, 8)["weights"] == (2 if bf16 else 4) * count
    assert sum(parts(2, 64).values()) < sum(parts(2, 8).values())


def test_checkpointing_saves_most_of_the_activations():
    job = paper_job("1.38b")
    setup = Setup(stage=1, gpus=8, micro_batch=8, rounds=16, bf16=True)
    plain, again = (predict(job, dataclasses.replace(setup, checkpointing=on)) for on in (False, True))
    assert again.memory.total < plain.memory.total - 15e9
    assert again.flops / plain.flops == pytest.approx(4 / 3, abs=0.05)
    assert again.tokens_per_s < plain.tokens_per_s


def test_online_labels_cost_the_teacher():
    cached, online = (
        make_job(load_config(CONFIGS / "69m.yaml", more), Cluster()) for more in ([], ["concept_labels.cache=null"])
    )
    setup = Setup(stage=1, gpus=8, micro_batch=8, rounds=1, bf16=True)
    assert "teacher and SAE" not in predict(cached, setup).memory.parts
    assert predict(online, setup).memory.parts["teacher and SAE"] > 2 * 124_000_000 + 4 * 32768 * 768
    assert step_flops(online, setup) / step_flops(cached, setup) == pytest.approx(3.17 / 1.67, rel=0.01)


def measured(cases, ranks=1):
    """What `plan_helpers` measures for each case, in processes of its own."""
    arguments = [plan_helpers.__file__, json.dumps(cases)]
    start = [sys.executable]
    if ranks > 1:
        start = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=600, env=environment(threads=1))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[{"coll')))


@pytest.mark.slow
def test_memory_under_deepspeed_is_what_a_step_holds():
    bucket, kinds = 200_000, [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
    cases = [
        (stage, precision, rounds, "interleave", {"reduce_bucket_size": bucket, **(ZERO_3 if stage == 3 else {})})
        for stage, precision in kinds
        for rounds in (1, 2)
    ]
    cases += [
        (stage, precision, 1, mixing, {"reduce_bucket_size": bucket})
        for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16"))
        for mixing in ("predict", "pause")
    ]
    off = _off_by_a_tenth(cases, bucket)
    # Garbage that Python has not collected yet adds to a peak now and then, and on busy cores a peak can be lower,
    # because communication ends at another moment: what was off is measured again, up to four times.
    for _ in range(4):
        if off:
            off = _off_by_a_tenth([case for case, _ in off], bucket)
    assert not off, off


def _off_by_a_tenth(cases, bucket):
    """Predicted over measured memory of the cases where they differ by more than a tenth."""
    off = []
    for case, found in zip(cases, measured(cases), strict=True):
        stage, precision, rounds, mixing, _ = case
        setup = Setup(
            stage,
            1,
            plan_helpers.MICRO_BATCH,
            rounds,
            precision == "bf16",
            bucket=bucket,
            kept_whole=0,
            persistence_threshold=0,
            device="cpu",
        )
        ratio = footprint(plan_helpers.shape(mixing), plan_helpers.N_HEAD, setup).total / found["peak"]
        if not 0.9 < ratio < 1.1:
            off.append((case, ratio))
    return off


# ---------------------------------------------------------------------------------------------- communication


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_communication_is_what_deepspeeds_logger_records(ranks):
    cases = [
        (0, "fp32", 2, "interleave", {}),
        (0, "fp32", 1, "none", {}),
        (1, "fp32", 2, "add", {}),
        (1, "bf16", 2, "interleave", {}),
        (2, "fp32", 2, "interleave", {}),
        (2, "bf16", 3, "none", {}),
        (3, "fp32", 2, "interleave", ZERO_3),
        (3, "bf16", 1, "none", ZERO_3),
        (3, "bf16", 2, "interleave", {"stage3_param_persistence_threshold": 0}),  # weights stay for the backward pass
        (3, "fp32", 2, "add", {"stage3_param_persistence_threshold": 5000}),  # small parameters always stay
        (3, "fp32", 1, "predict", ZERO_3),
        (3, "bf16", 1, "pause", ZERO_3),
        (1, "bf16", 1, "pause", {}),
    ]
    for case, found in zip(cases, measured(cases, ranks), strict=True):
        stage, precision, rounds, mixing, zero = case
        setup = Setup(
            stage,
            ranks,
            plan_helpers.MICRO_BATCH,
            rounds,
            precision == "bf16",
            persistence_threshold=zero.get("stage3_param_persistence_threshold", 100_000),
            kept_whole=0 if "stage3_max_reuse_distance" in zero else 500_000_000,
        )
        volume = communication(plan_helpers.shape(mixing), setup)
        predicted = {
            "all_reduce": volume.all_reduce,
            "reduce_scatter_tensor": volume.reduce_scatter,
            "all_gather_into_tensor": volume.all_gather,
        }
        assert {name: size for name, size in predicted.items() if size} == {
            name: size for name, size in found["collectives"].items() if size
        }, case


def test_one_gpu_needs_no_communication():
    assert communication(plan_helpers.shape("none"), Setup(3, 1, 2, 2, True)) == Communication()
    assert communication_time(Communication(), 1, Cluster()) == 0


def test_links_within_a_node_are_faster_and_latency_grows_with_the_nodes():
    cluster = Cluster(within_gb_s=400, between_gb_s=10, link_share=0.5, within_latency_us=0, between_latency_us=0)
    volume = Communication(all_reduce=8 * 10**9, messages=1)
    assert communication_time(volume, 8, cluster) == pytest.approx(2 * 7 / 8 * 8 / 200)
    assert communication_time(volume, 16, cluster) == pytest.approx(2 * 15 / 16 * 8 / 40)  # 8 networks of 10 GB/s
    slow = dataclasses.replace(cluster, between_latency_us=1e6)
    assert communication_time(Communication(messages=3), 64, slow) == pytest.approx(3 * 2 * 3)
    reduced = Communication(reduce_scatter=8 * 10**9, all_gather=10**9, messages=1)
    assert communication_time(reduced, 8, cluster) == pytest.approx(communication_time(volume, 8, cluster))


# ---------------------------------------------------------------------------------------------- other methods

ONLINE = ("distillation.cache=null", "concept_labels.cache=null")


@pytest.mark.parametrize("soft_targets", ["top", "whole"])
@pytest.mark.parametrize(
    ("seq_len", "rows", "more"),
    [(128, 8, {}), (64, 2, {"vocab_size": 12000}), (128, 8, {"vocab_size": 12000}), (512, 8, {"vocab_size": 4000})],
)
def test_memory_of_a_distilled_step_is_what_it_holds(soft_targets, seq_len, rows, more):
    student = plan_helpers.shape("none", seq_len, **more)
    model = plan_helpers.build(student)
    model.config.distillation_weight = 0.5
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    top_k, width = 8, 32
    head = torch.randn(student.vocab_size, width)

    def step():
        batch = plan_helpers.micro_batch(student, rows)
        shape = rows, seq_len
        if soft_targets == "top":
            batch |= {
                "soft_target_ids": torch.arange(top_k).repeat(*shape, 1),
                "soft_target_log_probs": torch.full((*shape, top_k), -3.0, dtype=torch.float16),
            }
        else:
            batch |= {"teacher_hidden": torch.randn(*shape, width), "teacher_head": head}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held += sum(p.nbytes for p in model.parameters())
    setup = Setup(
        stage=0,
        gpus=1,
        micro_batch=rows,
        rounds=1,
        bf16=False,
        device="cpu",
        soft_targets=soft_targets,
        soft_target_bytes=10 * top_k if soft_targets == "top" else 4 * width,
    )
    predicted = footprint(student, plan_helpers.N_HEAD, setup).total
    assert predicted == pytest.approx(held + plan_helpers.peak_above_start(step), rel=0.06)


def test_distillation_takes_memory_for_the_whole_distribution_or_the_head():
    top, whole = (
        make_plan(paper_job("methods/distillation", "h100", *ONLINE, *more), 8).stages[1].memory
        for more in ((), ("distillation.top_k=null",))
    )
    plain = make_plan(paper_job("69m", "h100", "model.mixing=none"), 8).stages[1].memory
    assert plain.total < whole.total and plain.total < top.total
    tokens = 32 * 1024
    assert (top.parts["soft targets"], whole.parts["soft targets"]) == (2 * tokens * 10 * 32, 2 * tokens * 2 * 768)
    assert whole.parts["teacher and SAE"] < top.parts["teacher and SAE"]


@pytest.mark.parametrize(
    ("method", "overrides", "teacher"),
    [
        ("pause", ONLINE, None),
        ("distillation", (), None),
        ("predict", (), None),
        ("activation", (), None),
        ("distillation", ONLINE, TeacherShape(768, 12, 0, 50257, 0, labels_by=None, soft_targets=True)),
        ("activation", ONLINE, TeacherShape(768, 12, 5, 50257, 32768, labels_by="activation")),
        ("predict", ONLINE, TeacherShape(768, 12, 5, 50257, 32768)),
        ("residual", ONLINE, TeacherShape(768, 12, 5, 50257, 32768)),
        ("predict", (*ONLINE, "distillation.weight=1"), TeacherShape(768, 12, 5, 50257, 32768, soft_targets=True)),
        ("predict", ("distillation.weight=1",), TeacherShape(768, 12, 0, 50257, 0, labels_by=None, soft_targets=True)),
    ],
)
def test_other_methods_have_the_teacher_that_they_need(method, overrides, teacher):
    job = paper_job(f"methods/{method}", "h100", *overrides)
    assert job.teacher == teacher
    text = describe(make_plan(job, 8))
    what = {"pause": "", "distillation": "soft targets"}.get(method, "labels")
    shown = f"mixing {job.shape.mixing}{', residual' if method == 'residual' else ''}"
    assert f"{shown}, " in text and what in text


def test_what_picks_labels_or_gives_soft_targets_costs_what_it_computes():
    forward, block, head = 12 * (12 * 768**2 + 1024 * 768), 12 * 768**2 + 1024 * 768, 50257 * 768
    shape = paper_job().shape
    costs = {
        labels_by: frozen_side(shape, TeacherShape(768, 12, 5, 50257, 32768, labels_by, soft_targets))
        for labels_by, soft_targets in (("attribution", False), ("activation", False), (None, True))
    }
    assert costs["activation"] == 6 * block + 32768 * 768
    assert costs[None] == forward + head
    backward = 6 * (12 * 768**2 + 2 * 1024 * 768) + head
    assert costs["attribution"] == forward + head + backward + 32768 * 768
    both = frozen_side(shape, TeacherShape(768, 12, 5, 50257, 32768, soft_targets=True))
    assert both == costs["attribution"] + costs[None]


def test_cached_soft_targets_need_no_head_of_the_teacher_that_labels_online():
    teacher = TeacherShape(768, 12, 5, 50257, 32768, "activation")
    plain, distilled = (
        footprint(paper_job().shape, 8, Setup(1, 1, 8, 1, True, soft_targets=soft_targets), teacher)
        for soft_targets in (None, "top")
    )
    assert distilled.parts["teacher and SAE"] == plain.parts["teacher and SAE"]


def test_a_teacher_that_reads_half_of_itself_needs_less_memory():
    def peak(labels_by, device="cuda"):
        teacher = labels_by and TeacherShape(768, 12, 5, 50257, 32768, labels_by)
        return footprint(paper_job().shape, 8, Setup(1, 1, 1, 1, True, device=device), teacher)

    none, by_attribution, by_activation = peak(None), peak("attribution"), peak("activation")
    assert by_activation.total < by_attribution.total
    # On a GPU labels are made beside training: what a pass through the teacher takes is there in every moment.
    activations = 8 * 1024 * 16 * 768 * 2 * 6
    assert by_attribution.total - none.total > 2 * 124e6 + 2 * 2 * 32768 * 768 + activations
    assert by_attribution.moment == none.moment


# ---------------------------------------------------------------------------------------------- choice and text


def test_the_choice_fits_is_offered_and_nothing_is_faster():
    plan = make_plan(paper_job("1.38b"), 8)
    chosen = plan.chosen
    assert chosen.fits and chosen.offered
    assert chosen.memory.total <= 77e9
    assert all(chosen.step_s <= found.step_s * 1.03 for found in plan.stages if found.fits and found.offered)
    assert not plan.stages[0].offered  # bf16 at stage 0
    assert plan.stages[1].setup.rounds == 1024 // 8 // 8


def test_a_small_gpu_gets_a_setup_that_saves_memory():
    job = paper_job("1.38b")
    small = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, memory_gb=20))
    chosen = make_plan(small, 8).chosen
    assert chosen.memory.total < 17e9
    assert chosen.step_s > make_plan(job, 8).chosen.step_s


def test_where_nothing_fits_it_says_what_would():
    job = paper_job("1.38b")
    tiny = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, memory_gb=15))
    plan = make_plan(tiny, 2)
    assert plan.chosen is None
    assert "nothing fits into 15 GB less 3 GB reserved" in plan.advice and "GPUs with train.zero_stage=" in plan.advice
    hopeless = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, memory_gb=3.1))
    assert make_plan(hopeless, 2).advice.endswith("a smaller model, context or concept_dim")


def test_more_gpus_are_faster_but_not_by_more_than_their_number():
    job = paper_job("386m")
    speeds = [make_plan(job, gpus).chosen.tokens_per_s for gpus in (8, 16, 32)]
    assert speeds[0] < speeds[1] < 2.05 * speeds[0] and speeds[1] < speeds[2] < 2.05 * speeds[1]


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(CocomixError, match="train.micro_batch could be 1, 2, 4, 8, 16$"):
        make_plan(paper_job("69m"), 32)
    with pytest.raises(CocomixError, match="the next batch that divides is 516"):
        make_plan(paper_job("69m"), 12)
    with pytest.raises(CocomixError, match="--gpus must be at least 1"):
        make_plan(paper_job("69m"), 0)
    assert make_plan(paper_job("69m"), 4096, raise_batch=True).global_batch == 4096


def test_shapes_come_from_token_files_and_the_teachers_folder(tmp_path):
    config = Config()
    config.data.folder, config.data.vocab_size = str(tmp_path), 777
    config.teacher.model, config.teacher.layer = str(tmp_path), 2
    assert paper_job("69m").shape.vocab_size == 50257
    (tmp_path / "config.json").write_text('{"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 99}')
    job = make_job(config, Cluster())
    assert job.shape.vocab_size == 777
    assert (job.teacher.n_embd, job.teacher.n_layer, job.teacher.vocab_size) == (48, 3, 99)
    (tmp_path / "meta.json").write_text('{"vocab_size": 555}')
    assert make_job(config, Cluster()).shape.vocab_size == 555
    config.teacher.layer = 3
    with pytest.raises(CocomixError, match="the teacher has blocks 0 to 2"):
        make_job(config, Cluster())
    config.teacher.model = "someone/else"
    with pytest.raises(CocomixError, match="its shape is unknown"):
        make_job(config, Cluster())


def test_the_shipped_clusters_are_found_by_name_and_others_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"a100", "h100", "h200"} <= set(known_clusters())
    assert load_cluster("h100").between_gb_s == 400 / 8
    (tmp_path / "mine.yaml").write_text("gpus_per_node: 4\n")
    assert load_cluster("mine.yaml") == Cluster(gpus_per_node=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("memory: 80", "unknown key memory; did you mean memory_gb?"),
        ("gpus_per_node: many", "gpus_per_node"),
        ("memory_tb_s: 0", "memory_tb_s must be positive"),
        ("overlap: 1.5", "overlap is a share"),
        ("reserved_gb: 90", "leaves nothing"),
        ("[1", r"line \d, column \d: this is not valid YAML: "),
        ("- 1", "holds no settings"),
    ],
)
def test_a_bad_cluster_file_is_refused(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(CocomixError, match=message.replace("?", r"\?")):
        load_cluster(str(tmp_path / "bad.yaml"))


def test_an_unknown_cluster_lists_the_known_ones():
    with pytest.raises(CocomixError, match="known names: .*a100, h100, h200"):
        load_cluster("v100")


def test_text_and_json_agree(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", str(CONFIGS / "1.38b.yaml"), "--gpus", "8", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    [plan] = json.loads(out.read_text())["plans"]
    assert plan["parameters"] == parameter_count(StudentShape(2048, 24, 5, 50257, 1024, 32768, 32))
    assert f"{plan['chosen']['tokens_per_s']:,.0f} tokens/s" in text
    for stage in plan["stages"]:
        assert f"{stage['memory_total'] / 1e9:.1f}" in text
    assert sum(plan["chosen"]["memory"]["parts"].values()) == plan["chosen"]["memory_total"]


def test_several_numbers_of_gpus_make_a_markdown_table(capsys):
    assert main(["plan", str(CONFIGS / "69m.yaml"), "--gpus", "8,4096"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and rows[2].startswith("| 8 | 512 |") and rows[3].startswith("| 4,096 | 4,096* |")
    assert "raised from 512" in text and text.startswith("Predicted for H100")


def test_planning_loads_nothing_heavy():
    code = (
        f"import sys; from cocomix.cli import main; main(['plan', {str(CONFIGS / '69m.yaml')!r}, '--gpus', '8']); "
        "print(*{'torch', 'deepspeed', 'transformers'} & set(sys.modules), 'end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "end", done.stdout + done.stderr
