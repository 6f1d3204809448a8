"""Which command reads which file of a world of `corrupt_world.py`, and what of its outcome matters."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE = "stopped/checkpoints/step-00000004"
SAE_AGAIN = ("sae", "config.yaml", "teacher.sae=begun")
TRAIN = ("train", "config.yaml", "train.run=new")
RESUME = ("train", "config.yaml", "train.run=stopped", "--resume")
ALONE = ("concept_labels.cache=new", "distillation.cache=null", "distillation.weight=0")
EVAL = ("eval", "stopped", "--windows", "24")
EVAL_FOLDER = ("eval", "exported", "--data", "data")
GENERATE = ("--prompt", "the quick", "--prompt", "a", "--max-new-tokens", "12")
CONCEPTS = ("concepts", "run", "--text", "the quick fox", "--corpus-tokens", "256", "--out", "concepts.html")
TASKS = ("eval", "run", "--tasks", "small_piqa", "--task-folder", "tasks")
PLAN = ("plan", "config.yaml", "--gpus", "1", "--cluster", "cluster.yaml")
MEASURED_KEYS = ("elapsed_s", "step_time_s", "tokens_per_s", "step_time_p10_s", "step_time_p90_s", "peak_memory_gib")
CHECKSUM_KEYS = ("crc32", "sha256", "checksum")  # of a line, its times among it
FOREIGN = "another program's model, without a checksum"
MEASURED = "another program's figures, without a checksum"
MODEL_FILES = ("exported/*config.json", "exported/tokenizer.json", "exported/*checksums.json", "exported/*.safetensors")
NAMES = ("run/model/concept_names.json",)
BY_HAND = "written by hand: another value is another valid input"

Result = Callable[[Path, str], Any]  # of the world's folder and what the command printed


@dataclass(frozen=True)
class Kind:
    """Files (patterns within the world) of which one is damaged, the command that reads it, and what of its outcome
    must be as if nothing were damaged. `untold` says why it cannot be told that something is damaged, where it is so:
    for files whose format has no checksum and which this program has not written."""

    what: str
    files: tuple[str, ...]
    command: tuple[str, ...]
    result: Result
    untold: str | None = None
    reads: str = ""  # the command in words, where its name does not say enough

    @property
    def name(self) -> str:
        """The row of the table."""
        return f"{self.what} -> {self.reads or self.command[0]}"

    def find(self, world: Path) -> list[Path]:
        """The files that there are, relative to the world."""
        found = sorted(file for pattern in self.files for file in world.glob(pattern) if file.is_file())
        if not found:
            raise ValueError(f"{self.name}: no file is there")
        return [file.relative_to(world) for file in found]


# --- what matters


def printed(_world: Path, output: str) -> str:
    """What the command says."""
    return output


def trained(run: str) -> Result:
    """A run's model, and what it has logged but for times."""

    def result(world: Path, _output: str):
        lines = (world / run / "metrics.jsonl").read_bytes().splitlines()
        return _contents(world, (f"{run}/model/*",)), [_without_times(line) for line in lines]

    return result


def _without_times(line: bytes):
    try:
        dropped = (*MEASURED_KEYS, *CHECKSUM_KEYS)
        return {key: value for key, value in json.loads(line).items() if key not in dropped}
    except (ValueError, AttributeError, RecursionError):
        return line


def files_of(*patterns: str) -> Result:
    """The content of files that match, by name."""
    return lambda world, _output: _contents(world, patterns)


def printed_and_files_of(*patterns: str) -> Result:
    """Both."""
    return lambda world, output: (output, _contents(world, patterns))


def _contents(world: Path, patterns) -> dict[str, Any]:
    files = sorted(file for pattern in patterns for file in world.glob(pattern) if file.is_file())
    return {str(file.relative_to(world)): _content(file) for file in files}


def _content(file: Path):
    """What a JSON file means, and the bytes of any other."""
    if file.suffix == ".json":
        try:
            return repr(json.loads(file.read_text()))
        except (ValueError, RecursionError):
            pass
    if file.suffix == ".html":
        return hashlib.sha256(masked(file.read_text()).encode()).hexdigest()
    return _digest(file)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def masked(text: str) -> str:
    """Text without dates and times."""
    return re.sub(r"\d{4}-\d{2}-\d{2}[T ]?(\d{2}:\d{2}(:\d{2})?)?", "DATE", text)


TRAINED, RESUMED = trained("new"), trained("stopped")
DATA = printed_and_files_of("data/*", "data/tokenizer/*")
LABELS, SOFT_TARGETS = ("labels/*.bin", "labels/meta.json"), ("soft-targets/*.bin", "soft-targets/meta.json")
CACHES = files_of(*LABELS, *SOFT_TARGETS)
NEW_LABELS = files_of("new/*.bin")
PAGE, OUT = printed_and_files_of("report/*"), files_of("out/*")

KINDS = (
    Kind("checkpoint rank-*.safetensors", (f"{STATE}/state/*",), RESUME, RESUMED, reads="train --resume"),
    Kind("checkpoint rank-*.safetensors", (f"{STATE}/state/*",), EVAL, printed),
    Kind("checkpoint rank-*.safetensors", (f"{STATE}/state/*",), ("export", "stopped", "out"), OUT),
    Kind("checkpoint trainer.json", (f"{STATE}/trainer.json",), RESUME, RESUMED, reads="train --resume"),
    Kind("checkpoint trainer.json", (f"{STATE}/trainer.json",), EVAL, printed),
    Kind("checkpoint model/*", (f"{STATE}/model/*",), EVAL, printed),
    Kind("checkpoint model/*", (f"{STATE}/model/*",), ("export", "stopped", "out"), OUT),
    Kind("tokens train.bin", ("data/train.bin",), TRAIN, TRAINED),
    Kind("tokens val.bin", ("data/val.bin",), TRAIN, TRAINED),
    Kind("tokens val.bin", ("data/val.bin",), EVAL, printed),
    Kind("tokens *.bin", ("data/*.bin",), ("data", "config.yaml"), DATA),
    Kind("tokens *.bin", ("data/*.bin",), ("data", "config.yaml", "--verify"), DATA, reads="data --verify"),
    Kind("tokens meta.json", ("data/meta.json",), TRAIN, TRAINED),
    Kind("tokens meta.json", ("data/meta.json",), ("data", "config.yaml"), DATA),
    Kind("tokens meta.json", ("data/meta.json",), EVAL, printed),
    Kind("tokens tokenizer/*", ("data/tokenizer/*",), TRAIN, TRAINED),
    Kind("tokens tokenizer/*", ("data/tokenizer/*",), ("data", "config.yaml"), DATA),
    Kind("label shards", ("labels/*.bin",), TRAIN, TRAINED),
    Kind("label shards", ("labels/*.bin",), ("labels", "config.yaml"), CACHES),
    Kind("soft-target shards", ("soft-targets/*.bin",), TRAIN, TRAINED),
    Kind("soft-target shards", ("soft-targets/*.bin",), ("labels", "config.yaml"), CACHES),
    Kind("cache meta.json", ("labels/meta.json", "soft-targets/meta.json"), TRAIN, TRAINED),
    Kind("cache meta.json", ("labels/meta.json", "soft-targets/meta.json"), ("labels", "config.yaml"), CACHES),
    Kind("run model.safetensors", ("run/model/model.safetensors",), ("eval", "run"), printed),
    Kind("model folder", MODEL_FILES, ("export", "exported", "out"), OUT),
    Kind("model folder", MODEL_FILES, ("generate", "exported", *GENERATE), printed),
    Kind("model folder", MODEL_FILES, EVAL_FOLDER, printed),
    Kind("own SAE folder", ("sae/*",), ("labels", "config.yaml", *ALONE), NEW_LABELS),
    Kind("own SAE folder", ("sae/*",), ("sae", "config.yaml"), printed_and_files_of("sae/*")),
    Kind("OpenAI SAE .pt", ("openai.pt",), ("labels", "config.yaml", "teacher.sae=openai.pt", *ALONE), NEW_LABELS),
    Kind(
        "sae.partial.pt", ("begun.partial.pt",), ("sae", "config.yaml", "teacher.sae=begun"), files_of("begun/*.saf*")
    ),
    Kind(
        "own teacher folder", ("ntp/model/*",), ("sae", "config.yaml", "teacher.sae=new"), files_of("new/*.safetensors")
    ),
    Kind("own teacher folder", ("ntp/model/*",), ("labels", "config.yaml", *ALONE), NEW_LABELS),
    Kind(
        "foreign teacher folder",
        ("foreign/*",),
        ("labels", "config.yaml", "teacher.model=foreign", *ALONE),
        NEW_LABELS,
        untold=FOREIGN,
    ),
    Kind("metrics.jsonl", ("stopped/metrics.jsonl",), RESUME, RESUMED, reads="train --resume"),
    Kind("metrics.jsonl", ("run/metrics.jsonl",), ("report", "ntp", "run"), PAGE),
    Kind("run.json", ("run/run.json",), ("report", "ntp", "run"), PAGE),
    Kind("run.json", ("run/run.json",), CONCEPTS, printed_and_files_of("concepts.html")),
    Kind("run.json", ("run/run.json",), ("eval", "run"), printed),
    Kind("run.json", ("stopped/run.json",), RESUME, RESUMED, reads="train --resume"),
    Kind("profile JSON", ("profile.json",), ("report", "--profile", "profile.json"), PAGE),
    Kind("benchmark JSON", ("bench.json",), ("report", "--bench", "bench.json"), PAGE, untold=MEASURED),
    Kind("evaluation results", ("run/evaluations/*",), TASKS, printed, reads="eval --tasks"),
    Kind("concept names", NAMES, (*CONCEPTS, "--concept", "quotes"), printed, untold=BY_HAND),
    Kind("concept names", NAMES, ("generate", "run", *GENERATE, "--steer", "quotes=3.0"), printed, untold=BY_HAND),
    Kind("concept names", ("exported/concept_names.json",), ("export", "exported", "out"), OUT, untold=BY_HAND),
    Kind("cluster YAML", ("cluster.yaml",), PLAN, printed, untold=BY_HAND),
    Kind("config YAML", ("config.yaml",), PLAN, printed, untold=BY_HAND),
)
