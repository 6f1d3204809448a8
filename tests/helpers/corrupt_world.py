"""A small folder with every kind of file that the program reads, made by its own commands for `corrupt_files.py`.

All paths are relative, so that a copy of the folder works wherever it lies: commands run inside it.
"""

import json
import os
import random
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from run_helpers import LATENTS, SEQ_LEN, write_text

from cocomix.cli import main
from cocomix.teacher import sae_training

ROOT = Path(__file__).parents[2]
WIDTH, CONTEXT, SAE_STEPS, STEPS, SAVE_EVERY = 32, SEQ_LEN, 12, 6, 2
CONFIG = f"""
out: .
data: {{folder: "${{out}}/data", text: ["${{out}}/text"], vocab_size: 280, val_fraction: 0.2, seq_len: {SEQ_LEN}}}
model: {{n_embd: {WIDTH}, n_layer: 2, n_head: 2, mixing: interleave, concept_dim: {LATENTS}, concept_topk: 4,
        insert_layer: 1}}
teacher: {{model: "${{out}}/ntp/model", sae: "${{out}}/sae", layer: 1, label_topk: 3}}
sae: {{n_latents: {LATENTS}, k: 4, tokens: {SAE_STEPS * 128}, batch_tokens: 128, warmup_steps: 2, aux_k: 8,
      dead_after_tokens: 1000}}
concept_labels: {{cache: "${{out}}/labels", shard_windows: 32}}
distillation: {{weight: 0.5, top_k: 4, cache: "${{out}}/soft-targets"}}
train: {{run: "${{out}}/run", tokens: {STEPS * 16 * SEQ_LEN}, global_batch: 16, micro_batch: 16, lr: 1e-3,
        warmup_steps: 2, log_every: 1, eval_every: 3, save_every: {SAVE_EVERY}, keep_checkpoints: {STEPS},
        tensorboard: false}}
"""
NTP = ("model.mixing=none", "distillation.weight=0", "distillation.cache=null", "concept_labels.cache=null")
TASK = """
task: small_piqa
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/small_piqa.jsonl}}
test_split: test
output_type: multiple_choice
metadata: {version: 1.0}
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [
    {"question": "the quick", "choices": ["fox", "river jumps"], "answer": 0},
    {"question": "a lazy", "choices": ["over", "dog"], "answer": 1},
    {"question": "under the", "choices": ["tree", "jumps"], "answer": 0},
]


def make_world(folder: Path) -> None:
    """Fill `folder`, which must not be there; run it in a process of its own, whose working folder it changes."""
    folder.mkdir()
    os.chdir(folder)
    draw = random.Random(0)
    secrets.token_hex = lambda length=32: draw.randbytes(length or 32).hex()  # of saves: two worlds then have the same
    Path("config.yaml").write_text(CONFIG)
    write_text(Path("text"), documents=3)
    for file in Path("text").iterdir():
        os.utime(file, (0, 0))  # which token files know, likewise
    do("data", "config.yaml")
    do("train", "config.yaml", "train.run=ntp", *NTP)
    do("sae", "config.yaml")
    begin_sae()
    write_openai_sae(Path("openai.pt"))
    write_foreign_teacher(Path("foreign"))
    do("labels", "config.yaml")
    do("train", "config.yaml")
    do("concepts", "run", "--name", "3=quotes", "--name", "5=trees")
    write_tasks(Path("tasks"))
    do("eval", "run", "--tasks", "small_piqa", "--task-folder", "tasks")
    stop_early(Path("run"), Path("stopped"), step=4)
    do("export", "run", "exported")
    shutil.copyfile(ROOT / "engine/cocomix/costs/cluster_files/h100.yaml", "cluster.yaml")
    do("profile", "config.yaml", "--labels", "cached", "--rounds", "1", "--json", "profile.json")
    write_benchmarks(Path("bench.json"))


def do(*arguments: str) -> None:
    """A command of the program, which must succeed."""
    code = main(list(arguments))
    if code != 0:
        raise RuntimeError(f"cocomix {' '.join(arguments)} ended with {code}")


def begin_sae() -> None:
    """An SAE training that was killed in its middle, of the same settings, as begun.partial.pt."""
    sae_training.STATE_SECONDS = 0.0
    train_step: Callable = sae_training.train_step

    def interrupted(state, *others):
        if state.step == SAE_STEPS // 2:
            raise KeyboardInterrupt
        train_step(state, *others)

    sae_training.train_step = interrupted
    if main(["sae", "config.yaml", "teacher.sae=begun"]) != 130:
        raise RuntimeError("the SAE training was not interrupted")
    sae_training.train_step = train_step


def write_openai_sae(path: Path) -> None:
    """A random TopK autoencoder in OpenAI's format."""
    torch.manual_seed(1)
    decoder = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
    content = {
        "encoder.weight": decoder.clone(),
        "decoder.weight": decoder.T.contiguous(),
        "latent_bias": torch.zeros(LATENTS),
        "pre_bias": torch.zeros(WIDTH),
        "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.int64),
        "activation": "TopK",
        "activation_state_dict": {"k": 4, "postact_fn": "ReLU"},
    }
    torch.save(content, path)


def write_foreign_teacher(folder: Path) -> None:
    """A random GPT-2 as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    shape = GPT2Config(vocab_size=280, n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=2, initializer_range=0.2)
    GPT2LMHeadModel(shape).save_pretrained(folder)


def write_tasks(folder: Path) -> None:
    """A task of lm-evaluation-harness with its data beside it."""
    folder.mkdir()
    (folder / "small_piqa.yaml").write_text(TASK)
    (folder / "small_piqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))


def stop_early(run: Path, copy: Path, step: int) -> None:
    """A copy of a finished run as a kill would have left it some time after it had saved `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "evaluations")
    for folder in (copy / "checkpoints").iterdir():
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)


def write_benchmarks(path: Path) -> None:
    """What pytest-benchmark leaves of a few cases."""

    def spread(median: float) -> dict[str, float]:
        return {"median": median, "p10": median * 0.9, "p90": median * 1.1}

    rows = [
        {
            "operation": "topk_linear",
            "case": f"encode-n{n}",
            "contestant": contestant,
            "shape": {"N": n, "d": 64, "dtype": "torch.float32"},
            "ms": spread(ms * n),
            "floor_formula": "one product",
            "ratio_to_floor": spread(ms / 2),
        }
        for n in (512, 1024)
        for contestant, ms in (("torch", 4.0), ("public", 6.0), ("floor", 2.0))
    ]
    content = {
        "machine_info": {"cocomix": {"device": "a chip", "threads": 2}},
        "benchmarks": [{"extra_info": row} for row in rows],
    }
    path.write_text(json.dumps(content, indent=2))
