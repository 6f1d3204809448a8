"""A tiny world for tests of whole runs: text, token files, a random teacher with a random SAE, and label caches."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from cocomix.cli import main
from cocomix.core.config import Config, load_config
from cocomix.data.preparation import prepare
from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowOrder, step_windows
from cocomix.model.config import CoCoMixConfig
from cocomix.model.model import CoCoMixForCausalLM
from cocomix.teacher.extraction import run as make_labels
from cocomix.teacher.label_cache import LabelCache
from cocomix.teacher.sae import SparseAutoencoder
from cocomix.teacher.supervision_kind import data_fingerprints
from cocomix.training.train_step import TrainStep

SEQ_LEN, LATENTS, LABEL_TOPK, STEPS = 16, 64, 3, 12
TORCHRUN = ("torchrun", "--nproc-per-node", "2", "-m")
# The defaults keep parameters as small as the tests' on every rank.
PARTITION_ALL = [
    f"deepspeed.zero_optimization.stage3_{name}=0"
    for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
]
WORDS = "the a cat dog fox runs jumps over under quick lazy brown and or of to tree house river sleeps eats".split()

CONFIG = f"""
out: OUT
data: {{folder: "${{out}}/data", text: [OUT/text], vocab_size: 300, val_fraction: 0.1, seq_len: {SEQ_LEN}}}
model: {{n_embd: 32, n_layer: 3, n_head: 2, mixing: interleave, concept_dim: {LATENTS}, concept_topk: 4,
        insert_layer: 1}}
teacher: {{model: "${{out}}/teacher", sae: "${{out}}/sae", layer: 1, label_topk: {LABEL_TOPK}}}
sae: {{n_latents: {LATENTS}, k: 4, tokens: 4096, batch_tokens: 256, warmup_steps: 2, aux_k: 8,
      dead_after_tokens: 2000}}
concept_labels: {{shard_windows: 64}}
train: {{run: "${{out}}/run", tokens: {STEPS * 8 * SEQ_LEN}, global_batch: 8, micro_batch: 4, lr: 1e-3,
        warmup_steps: 3, log_every: 1, eval_every: 6, save_every: 4, tensorboard: false}}
"""


def write_text(folder: Path, documents: int = 12, seed: int = 0) -> None:
    """A few kilobytes of text."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(documents):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(300)) + ".\n")


class World:
    """A folder with `config.yaml` and what it names; runs go below it."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, folder / "config.yaml"
        write_text(folder / "text")
        self.config.write_text(CONFIG.replace("OUT", str(folder)))
        prepare(self.load().data)

    def load(self, *overrides: str) -> Config:
        """The config with overrides."""
        return load_config(self.config, list(overrides))

    def add_teacher(
        self,
        folder: str = "teacher",
        sae: str = "sae",
        width: int = 32,
        latents: int = LATENTS,
        vocab_size: int = 300,
        seed: int = 0,
    ) -> None:
        """A random GPT-2 of two blocks and a random SAE of its width."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(seed)
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size, n_positions=SEQ_LEN, n_embd=width, n_layer=2, n_head=2, initializer_range=0.2
            )
        ).save_pretrained(self.folder / folder)
        decoder = torch.nn.functional.normalize(torch.randn(latents, width), dim=1)
        SparseAutoencoder(decoder.clone(), torch.zeros(latents), torch.zeros(width), decoder, 4, normalize=True).save(
            self.folder / sae
        )

    def add_uneven_labels(self, name: str, latents: int = LATENTS) -> Path:
        """A label cache made by hand: whole windows without any label, tokens with one, two or three."""
        tokens = TokenFiles.open(self.folder / "data")
        config = self.load()
        n_windows = tokens.split("train").n_windows(SEQ_LEN)
        cache = LabelCache.create(
            self.folder / name,
            n_windows=n_windows,
            seq_len=SEQ_LEN,
            label_topk=LABEL_TOPK,
            shard_windows=64,
            fingerprints=data_fingerprints(config, tokens) | {"layer": "1", "label_topk": str(LABEL_TOPK)},
        )
        draw = np.random.default_rng(0)
        for shard in range(cache.n_shards):
            n = len(cache.windows_of(shard))
            ids = np.broadcast_to(np.arange(latents), (n, SEQ_LEN, latents))
            labels = draw.permuted(ids, axis=-1)[..., :LABEL_TOPK]
            kept = draw.integers(0, LABEL_TOPK + 1, (n, SEQ_LEN)) * (draw.random((n, 1)) < 0.6)
            cache.append(shard, np.where(np.arange(LABEL_TOPK) < kept[..., None], labels, -1))
        return self.folder / name

    def train(self, run: str, *overrides: str, resume: bool = False, branch_from: str | None = None) -> int:
        """`cocomix train` in this process; its exit code."""
        options = ["--resume"] * resume
        if branch_from is not None:
            options += ["--branch-from", str(self.folder / branch_from)]
        return main(["train", str(self.config), f"train.run={self.folder / run}", *overrides, *options])

    def train_on_two(self, run: str, *overrides: str, launcher=TORCHRUN) -> None:
        """`cocomix train` on two processes, to its end."""
        done = subprocess.run(
            self.command(run, *overrides, launcher=launcher),
            env=environment(threads=1),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def train_on(self, ranks: int, runs: dict[str, list[str]]) -> None:
        """`cocomix train` for each of `runs` (name: overrides and options), one after the other on `ranks` processes:
        starting processes takes longer than training."""
        commands = [["train", str(self.config), f"train.run={self.folder / run}", *more] for run, more in runs.items()]
        launcher = Path(sys.executable).with_name("torchrun")
        done = subprocess.run(
            [
                launcher,
                "--nproc-per-node",
                str(ranks),
                Path(__file__).with_name("several_runs.py"),
                json.dumps(commands),
            ],
            env=environment(threads=1),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def cut(self, run: str, copy: str, step: int) -> str:
        """A copy of a finished run as it was when it had just saved `step`; its name."""
        shutil.copytree(self.folder / run, self.folder / copy)
        shutil.rmtree(self.folder / copy / "model")
        for folder in (self.folder / copy / "checkpoints").iterdir():
            if folder.name > f"step-{step:08d}":
                shutil.rmtree(folder)
        return copy

    def command(self, run: str, *overrides: str, launcher=()) -> list[str]:
        """The command line of `cocomix train`, by default for one process."""
        if launcher:
            start = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:], "cocomix"]
        else:
            start = [sys.executable, "-m", "cocomix"]
        return [*start, "train", str(self.config), f"train.run={self.folder / run}", *overrides]

    def interrupt(
        self, command: list[str], run: str, after_step: int, number: int, threads: int | None = None
    ) -> tuple[int, str]:
        """Start `command`, send it signal `number` once `run` has logged `after_step`; exit code and output."""
        process = subprocess.Popen(
            command, env=environment(threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 60
        while last_step(self.folder / run) < after_step:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def records(self, run: str, kind: str = "train") -> list[dict]:
        """The lines of a run's metrics of one kind."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def losses(self, run: str, key: str = "loss") -> list[float]:
        """A loss at every step; checks that no step is missing or there twice."""
        records = self.records(run)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [record[key] for record in records]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        """The finished model's tensors."""
        return load_file(self.folder / run / "model" / "model.safetensors")

    def tree(self) -> set[Path]:
        """Every file and folder there is, to see that a refused command left nothing behind."""
        return set(self.folder.rglob("*"))


def before_steps(monkeypatch, work) -> None:
    """Call `work(train_step)` before each optimizer step."""
    step = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, batches: (work(self), step(self, batches))[1])


def stop_at(monkeypatch, step: int, times: int = 1) -> None:
    """SIGTERM to this process in 1-based `step`."""

    def interrupt(train_step):
        if train_step.engine.global_steps + 1 == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    before_steps(monkeypatch, interrupt)


def last_step(run: Path) -> int:
    """The last step that a living run has logged, 0 before the first."""
    try:
        steps = re.findall(r'"kind": "train", "step": (\d+)', (run / "metrics.jsonl").read_text())
    except FileNotFoundError:
        return 0
    return int(steps[-1]) if steps else 0


def environment(threads: int | None = None) -> dict[str, str]:
    """For a subprocess: as many threads as this process has, so that sums round alike."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}


def assert_equal_runs(world: World, run: str, other: str) -> None:
    """Losses, learning rates and final weights are the same bits."""
    for key in ("loss", "ntp_loss", "concept_loss", "lr", "grad_norm"):
        assert world.losses(run, key) == world.losses(other, key)
    assert [e["loss"] for e in world.records(run, "eval")] == [e["loss"] for e in world.records(other, "eval")]
    assert_close_weights(world.weights(run), world.weights(other), atol=0)


def assert_close_weights(weights, others, atol: float) -> None:
    """Same names, and values within `atol`."""
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, others[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def labelled_world(folder: Path) -> World:
    """A world with teacher, SAE, a true label cache, and one whose labels are spread unevenly."""
    world = World(folder)
    world.add_teacher()
    world.add_uneven_labels("uneven")
    make_labels(world.load(f"concept_labels.cache={folder}/labels"))
    return world


def reference_run(world, *overrides, skipped=(), loss_of=None):
    """The method in plain PyTorch: whole global batches, AdamW, clipping, warm-up and cosine; 1-based steps that are
    `skipped` update nothing. `loss_of(model, ids, labels)` is the loss of a batch, by default what the model returns.

    Returns losses, learning rates and gradient norms by step, and the weights.
    """
    config = world.load(*overrides)
    train, tokens = config.train, TokenFiles.open(config.data.folder)
    cache = LabelCache.open(config.concept_labels.cache) if config.concept_labels.cache else None
    split = tokens.split("train")
    torch.manual_seed(train.seed)
    shape = {**vars(config.model), "vocab_size": tokens.vocab_size, "n_positions": SEQ_LEN}
    model = CoCoMixForCausalLM(CoCoMixConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    order = WindowOrder(split.n_windows(SEQ_LEN), train.seed)
    losses, rates, norms = [], [], []
    for step in range(STEPS):
        windows = step_windows(order, step, train.global_batch)
        ids = torch.from_numpy(np.stack([split.window(i, SEQ_LEN) for i in windows]))
        labels = torch.from_numpy(np.stack([cache.window(i) for i in windows])) if cache else None
        loss = loss_of(model, ids, labels) if loss_of else model(ids, labels=ids, concept_labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)))
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        rates.append(train.lr * ((step + 1) / 3 if step < 3 else 0.1 + 0.9 * cosine))
        optimizer.param_groups[0]["lr"] = rates[-1]
        if step + 1 not in skipped:
            optimizer.step()
        losses.append(loss.item())
    return losses, rates, norms, model.state_dict()


def stage(number: int) -> list[str]:
    """Overrides for a ZeRO stage; at stage 3 with every parameter split, and Adam's state in several parts."""
    if number != 3:
        return [f"train.zero_stage={number}"]
    return ["train.zero_stage=3", *PARTITION_ALL, "deepspeed.zero_optimization.sub_group_size=4000"]


def uneven(world, *more) -> list[str]:
    """Overrides that take the unevenly spread labels."""
    return [f"concept_labels.cache={world.folder}/uneven", "teacher.model=null", "teacher.sae=null", *more]
