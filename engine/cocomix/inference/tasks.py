"""Tasks of lm-evaluation-harness over checkpoints: `cocomix eval CHECKPOINT... --tasks NAME,...`.

The harness is used as a library (github.com/EleutherAI/lm-evaluation-harness): its tasks, its scoring, its adapter for
models of transformers. Every result is kept as soon as a task is done, so that an interrupted evaluation of many
checkpoints continues where it stopped.
"""

import contextlib
import difflib
import hashlib
import logging
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs
from cocomix.core.files import read_json, write_own_json
from cocomix.core.locks import only_writer
from cocomix.core.tables import text_table
from cocomix.distributed.export import find_model, read_model, run_of
from cocomix.distributed.ranks import own_device
from cocomix.inference.concept_names import FILE as CONCEPT_NAMES
from cocomix.inference.loading import load_usable

BOOTSTRAP_DRAWS = 1000  # for standard errors that have no formula
_PATIENCE_S = 10.0  # for another process that is just writing its results
_RATIOS = {"word_perplexity": math.exp, "byte_perplexity": math.exp, "bits_per_byte": None}


@dataclass(frozen=True)
class TaskOptions:
    """What is evaluated, and how: names of tasks, a folder with tasks of one's own (the harness's YAML files), the
    number of examples before each question (None: the task's own), the most documents of a task (None: all), sequences
    in a forward pass, and a folder for the results (None: beside the models)."""

    names: tuple[str, ...]
    folder: str | None = None
    shots: int | None = None
    limit: int | None = None
    batch: int = 8
    out: str | None = None


def evaluate_tasks(checkpoints: list[str], options: TaskOptions) -> list[dict]:
    """Evaluate every checkpoint on every task, print a table with a row a checkpoint, and return its rows.

    A row maps "checkpoint" to a path and "TASK METRIC" to (value, standard error or None). Results that are already
    there, of the same model files, task files and settings, are not computed again. Raises `CocomixError` where the
    harness is not installed, for unknown tasks, tasks whose data cannot be had, and what is no model.
    """
    harness = _Harness(options)
    for checkpoint in checkpoints:
        find_model(checkpoint)  # raises where there is none, before the work begins
    rows = []
    for checkpoint in checkpoints:
        results, missing, usable = read_model(checkpoint, lambda folder: _begin(folder, options, harness.settings))
        if usable is not None:
            adapter = harness.adapter(usable)
            for name in missing:
                results.add(name, harness.evaluate(adapter, name))
        rows.append(_row(checkpoint, results.tasks, options.names))
    print(format_table(rows))
    return rows


def _begin(folder: Path, options: TaskOptions, settings: dict):
    """The results that are there of a model, the names of tasks that are missing, and the model where some are."""
    results = _StoredResults(_result_file(folder, options.out), _file_listing(folder), settings)
    missing = [name for name in options.names if name not in results.tasks]
    return results, missing, load_usable(folder, own_device()) if missing else None


class _Harness:
    """lm-evaluation-harness with its tasks loaded once for all checkpoints."""

    def __init__(self, options: TaskOptions):
        with needs("--tasks", "lm-evaluation-harness", "cocomix[eval]"):
            import lm_eval
            from lm_eval import tasks
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._options = options
        self._manager = self._find_tasks(tasks.TaskManager)
        self._loaded = {}
        self.settings = {
            "shots": options.shots,
            "limit": options.limit,
            "lm_eval": lm_eval.__version__,
            "task_files": _file_listing(Path(options.folder)) if options.folder else None,
        }

    def _find_tasks(self, task_manager) -> Any:
        folder, names = self._options.folder, self._options.names
        if folder and not Path(folder).is_dir():
            raise CocomixError(f"--task-folder: there is no folder {folder}")
        if folder:  # to read all that come with the harness takes seconds
            manager = task_manager(include_path=folder, include_defaults=False)
            if all(name in manager.all_tasks for name in names):
                return manager
        manager = task_manager(include_path=folder)
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
                raise CocomixError(f"there is no task {name}; {hint}")
        return manager

    def adapter(self, usable):
        """The harness's view of a model with its tokenizer."""
        from lm_eval.models.huggingface import HFLM

        return cast(Any, HFLM)(
            pretrained=usable.model,
            tokenizer=usable.tokenizer,
            backend="causal",
            batch_size=self._options.batch,
            max_length=usable.context,
        )

    def evaluate(self, adapter, name: str) -> dict:
        """Metrics of one task, or of the tasks of one group: {task: {metric: [value, standard error or None]}}."""
        import lm_eval

        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        with _quiet_harness():
            results = cast(Any, lm_eval).simple_evaluate(
                adapter,
                tasks=self._loaded[name],
                num_fewshot=self._options.shots,
                limit=self._options.limit,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                task_manager=self._manager,
            )
        return {task: _metrics(found, results["samples"].get(task, ())) for task, found in results["results"].items()}

    def _load(self, name: str) -> list:
        try:
            with _quiet_harness():
                loaded = self._manager.load([name])
        except Exception as error:  # the harness, its task files and the data libraries have no common base exception
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CocomixError(f"the task {name} cannot be loaded: {reason}") from error
        return [name] if loaded["groups"] else list(loaded["tasks"].values())


@contextlib.contextmanager
def _quiet_harness():
    """Its chatter goes to the error stream, and its bootstrap stays in this process."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _metrics(found: dict, samples) -> dict[str, list]:
    """The numbers among the harness's "METRIC,FILTER" entries; a filter other than "none" stays in the name."""
    metrics = {}
    for key, value in found.items():
        metric, _, kind = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
            continue
        error = found.get(f"{metric}_stderr,{kind}")
        if not isinstance(error, int | float):
            error = _ratio_error(metric, value, [sample[metric] for sample in samples if metric in sample])
        metrics[metric if kind == "none" else f"{metric} ({kind})"] = [value, error]
    return metrics


def _ratio_error(metric: str, value: float, sums: list) -> float | None:
    """Standard error of what is made of sum(loglikelihoods) / sum(words or bytes) over n documents, by linearisation:
    the harness gives none. None for other metrics and for a single document."""
    if metric not in _RATIOS or len(sums) < 2:
        return None
    n, total = len(sums), sum(size for _, size in sums)
    rate = sum(likelihood for likelihood, _ in sums) / total
    squares = sum((likelihood - rate * size) ** 2 for likelihood, size in sums)
    error = math.sqrt(n / (n - 1) * squares) / total
    return error * value if _RATIOS[metric] is math.exp else error / math.log(2)


class _StoredResults:
    """Results of one model in a JSON file; those of other model files, task files or settings are not read."""

    def __init__(self, path: Path, model: dict, settings: dict):
        self._path, self._origin = path, {"model": model, "settings": settings}
        self.tasks = self._stored()

    def _stored(self) -> dict:
        if not self._path.is_file():
            return {}
        content = read_json(self._path, "the results of an earlier evaluation")
        known = content.get("origin") == self._origin and isinstance(content.get("tasks"), dict)
        return content["tasks"] if known else {}

    def add(self, name: str, metrics: dict) -> None:
        """Keep the metrics of a task, beside those that other processes have kept meanwhile."""
        with only_writer(self._path, "cocomix eval --tasks", wait_s=_PATIENCE_S):
            self.tasks = self._stored() | self.tasks | {name: metrics}
            write_own_json(self._path, {"origin": self._origin, "tasks": self.tasks})


def _result_file(folder: Path, out: str | None) -> Path:
    """Where a model's results are kept: `evaluations/` in its run, or else beside the model."""
    folder = Path(os.path.abspath(folder))
    if out is not None:
        name = re.sub(r"[^\w.-]+", "-", str(folder)).strip("-")
        return Path(out) / f"{name}.json"
    run = run_of(folder.parent)
    if run is not None:
        return run / "evaluations" / ("-".join(folder.relative_to(run).parts) + ".json")
    return folder.with_name(f"{folder.name}.evaluations.json")


def _file_listing(folder: Path) -> dict:
    """Number and total bytes of a folder's files, and a hash of their names, sizes and times. Names that people give to
    concepts decide about no result."""
    found = (path for path in sorted(folder.rglob("*")) if path.name != CONCEPT_NAMES)
    files = [(path, path.stat()) for path in found if path.is_file()]
    digest = hashlib.sha256()
    for path, status in files:
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return {"files": len(files), "bytes": sum(status.st_size for _, status in files), "sha256": digest.hexdigest()}


def _row(checkpoint: str, tasks: dict, names) -> dict:
    row = {"checkpoint": str(checkpoint)}
    for name in names:
        shown = {name: tasks[name][name]} if name in tasks[name] else tasks[name]  # of a group, its own figures
        for task, metrics in shown.items():
            row |= {f"{task} {metric}": tuple(figures) for metric, figures in metrics.items()}
    return row


def format_table(rows: list[dict]) -> str:
    """Text table of rows as `evaluate_tasks` returns them: a line a checkpoint, value ± standard error."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return text_table(columns, [[_cell(row.get(column, "")) for column in columns] for row in rows])


def _cell(content) -> str:
    if isinstance(content, str):
        return content
    value, error = content
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
