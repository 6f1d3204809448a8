"""lm-evaluation-harness on local tasks: scores against plain ones, standard errors, and going on where it stopped."""

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
from run_helpers import SEQ_LEN, World
from transformers import AutoModelForCausalLM

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.inference import tasks
from cocomix.inference.concept_names import add_names
from cocomix.inference.loading import load_usable
from cocomix.inference.tasks import TaskOptions, evaluate_tasks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'cocomix[eval]'")

SENTENCES = [
    "the quick fox jumps over the lazy dog",
    "a brown cat sleeps under the tree and",
    "the river runs to house",
    "a dog eats the quick cat",
    "fox and dog",
    "the lazy house of the brown dog runs under a tree and over",
]
_DRAW = random.Random(0)
PAGES = ["a cat sleeps", *(" ".join(_DRAW.choices(SENTENCES, k=_DRAW.randint(2, 5))) for _ in range(24))]
QUESTIONS = [
    {"question": "the quick", "choices": ["fox", "river jumps"], "answer": 0},
    {"question": "a lazy", "choices": ["over", "dog", "the"], "answer": 1},
    {"question": "under the", "choices": ["tree", "jumps"], "answer": 0},
]

_COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
output_type: {kind}
metadata: {{version: 1.0}}
"""
TASKS = {
    "small_lambada": (
        "loglikelihood",
        [{"text": text} for text in SENTENCES],
        """
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    ),
    "small_wikitext": (
        "loglikelihood_rolling",
        [{"page": page} for page in PAGES],
        """
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    ),
    "small_piqa": (
        "multiple_choice",
        QUESTIONS,
        """
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    ),
}
NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Tasks of the three kinds that language models are compared on, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (kind, documents, settings) in TASKS.items():
        (folder / f"{name}.yaml").write_text(_COMMON.format(name=name, folder=folder, kind=kind) + settings)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.add_teacher()
    assert world.train("run") == 0
    return world


@pytest.fixture
def options(task_folder, tmp_path):
    return TaskOptions(NAMES, task_folder, batch=3, out=str(tmp_path / "results"))


@torch.no_grad()
def log_probabilities(model, ids):
    """Of the token after each token of one sequence: [T, V]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def plain_likelihood(model, tokenizer, context, continuation):
    """Log-likelihood of the continuation, and whether it is what the model finds likeliest all along. What of the
    context is too long for the model is left out."""
    wanted = tokenizer.encode(context + continuation)[len(tokenizer.encode(context)) :]
    ids = tokenizer.encode(context + continuation)[-SEQ_LEN - 1 : -1]
    log_p, wanted = log_probabilities(model, ids)[-len(wanted) :], torch.tensor(wanted)
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


def plain_rolling(model, tokenizer, page):
    """Log-likelihood of a page: windows side by side, each after the token before it, the first after end-of-text."""
    ids, total = [tokenizer.eos_token_id, *tokenizer.encode(page)], 0.0
    for start in range(0, len(ids) - 1, SEQ_LEN):
        end = min(start + SEQ_LEN, len(ids) - 1)
        context = max(0, end - SEQ_LEN) if start else 0  # the last window is as long as the others
        log_p = log_probabilities(model, ids[context:end])
        predicted = torch.tensor(ids[context + 1 : end + 1])
        total += float(log_p.gather(1, predicted[:, None])[start - context :].sum())
    return total


def bootstrap(values, of):
    """Standard error of `of` a resampled mean of values [n]."""
    values = torch.tensor(values)
    draws = torch.randint(len(values), (20_000, len(values)), generator=torch.Generator().manual_seed(0))
    return float(of(values[draws].mean(1)).std())


def test_scores_are_those_of_plain_computations(world, options, capsys):
    (row,) = evaluate_tasks([str(world.folder / "run")], options)
    usable = load_usable(world.folder / "run")
    likelihoods = [
        plain_likelihood(usable.model, usable.tokenizer, " ".join(words[:-1]), " " + words[-1])
        for words in map(str.split, SENTENCES)
    ]
    perplexity, error = row["small_lambada perplexity"]
    assert perplexity == pytest.approx(math.exp(-sum(value for value, _ in likelihoods) / len(SENTENCES)), rel=1e-4)
    assert error == pytest.approx(bootstrap([value for value, _ in likelihoods], lambda mean: (-mean).exp()), rel=0.4)
    accuracy, error = row["small_lambada acc"]
    hits = torch.tensor([float(greedy) for _, greedy in likelihoods])
    assert accuracy == pytest.approx(float(hits.mean()))
    assert error == pytest.approx(float(hits.std() / len(hits) ** 0.5))
    right = []
    for document in QUESTIONS:
        found = [
            plain_likelihood(usable.model, usable.tokenizer, document["question"], " " + choice)[0]
            for choice in document["choices"]
        ]
        right.append(float(found.index(max(found)) == document["answer"]))
    assert row["small_piqa acc"][0] == pytest.approx(sum(right) / 3)
    assert row["small_piqa acc"][1] == pytest.approx(float(torch.tensor(right).std() / 3**0.5))
    shown = capsys.readouterr().out
    assert "small_lambada perplexity" in shown and f"{row['small_piqa acc'][0]:.4g} ± " in shown


def test_rolling_perplexity_reads_every_token_once_and_has_a_standard_error(world, options):
    (row,) = evaluate_tasks([str(world.folder / "run")], options)
    usable = load_usable(world.folder / "run")
    likelihoods = [plain_rolling(usable.model, usable.tokenizer, page) for page in PAGES]
    for unit, sizes in (("word", [len(page.split(" ")) for page in PAGES]), ("byte", [len(page) for page in PAGES])):
        value, error = row[f"small_wikitext {unit}_perplexity"]
        rate = sum(likelihoods) / sum(sizes)
        assert value == pytest.approx(math.exp(-rate), rel=1e-4)
        draws = torch.randint(len(PAGES), (20_000, len(PAGES)), generator=torch.Generator().manual_seed(0))
        drawn = torch.tensor(likelihoods)[draws].sum(1) / torch.tensor(sizes)[draws].sum(1)
        assert error == pytest.approx(float(value * drawn.std()), rel=0.15)
    value, error = row["small_wikitext bits_per_byte"]
    assert value == pytest.approx(-rate / math.log(2), rel=1e-4)
    assert error == pytest.approx(row["small_wikitext byte_perplexity"][1] / math.exp(-rate) / math.log(2), rel=1e-4)


def counted_forwards(monkeypatch):
    """Names of the tasks that are computed from here on."""
    names, original = [], tasks._Harness.evaluate
    monkeypatch.setattr(
        tasks._Harness, "evaluate", lambda self, adapter, name: (names.append(name), original(self, adapter, name))[1]
    )
    return names


@pytest.mark.slow
def test_many_checkpoints_give_a_row_each_and_an_interrupted_evaluation_goes_on(world, options, monkeypatch):
    checkpoints = [str(folder) for folder in sorted((world.folder / "run/checkpoints").glob("step-*"))]
    checkpoints += [str(world.folder / "run"), str(world.folder / "teacher")]
    shutil.copytree(world.folder / "data/tokenizer", world.folder / "teacher", dirs_exist_ok=True)
    assert len(checkpoints) == 4
    original, done = tasks._Harness.evaluate, []

    def interrupted(self, adapter, name):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        return original(self, adapter, name)

    with monkeypatch.context() as patched:
        patched.setattr(tasks._Harness, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_tasks(checkpoints, options)
    computed = counted_forwards(monkeypatch)
    rows = evaluate_tasks(checkpoints, options)
    assert computed == [NAMES[2], *NAMES, *NAMES]
    assert [row["checkpoint"] for row in rows] == checkpoints
    assert all(len(row) == 7 for row in rows)
    assert rows[1]["small_lambada perplexity"] == rows[2]["small_lambada perplexity"]  # the last step is the model
    assert rows[0]["small_lambada perplexity"] != rows[2]["small_lambada perplexity"]
    computed.clear()
    assert evaluate_tasks(checkpoints, options) == rows and computed == []


@pytest.mark.slow
def test_other_settings_task_files_or_weights_are_computed_anew(world, options, task_folder, tmp_path, monkeypatch):
    shutil.copytree(world.folder / "run/model", tmp_path / "model")
    shutil.copytree(task_folder, tmp_path / "tasks")
    one = replace(options, names=NAMES[:1], folder=str(tmp_path / "tasks"))
    computed = counted_forwards(monkeypatch)

    def count(changed):
        computed.clear()
        evaluate_tasks([str(tmp_path / "model")], changed)
        return len(computed)

    assert [count(one), count(one), count(replace(one, limit=2)), count(one), count(one)] == [1, 0, 1, 1, 0]
    (tmp_path / "tasks" / "small_lambada.yaml").open("a").write("# changed\n")
    assert [count(one), count(one)] == [1, 0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CocomixError, match="where it was changed on purpose, delete .*cocomix_checksums.json"):
        count(one)
    (tmp_path / "model/cocomix_checksums.json").unlink()
    assert count(one) == 1


def test_results_of_evaluations_side_by_side_are_all_kept(tmp_path):
    """Each has read the file before the others wrote it."""
    path = tmp_path / "run/evaluations/model.json"
    some = [tasks._StoredResults(path, {"files": 1}, {"limit": 2}) for _ in range(3)]
    for number, results in enumerate(some):
        results.add(f"task-{number}", {"acc": [number, None]})
    found = tasks._StoredResults(path, {"files": 1}, {"limit": 2}).tasks
    assert found == {f"task-{number}": {"acc": [number, None]} for number in range(3)} == some[2].tasks
    tasks._StoredResults(path, {"files": 2}, {"limit": 2}).add("other", {})  # of other files: it starts afresh
    assert set(tasks._StoredResults(path, {"files": 2}, {"limit": 2}).tasks) == {"other"}
    assert list(path.parent.iterdir()) == [path]


def test_naming_a_concept_does_not_make_results_old(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = tasks._file_listing(tmp_path)
    add_names(tmp_path, ["3=quotes"], 64)
    assert tasks._file_listing(tmp_path) == before
    (tmp_path / "more.json").write_text("{}")
    assert tasks._file_listing(tmp_path) != before


def test_results_lie_in_the_run_or_beside_the_model(world, task_folder, tmp_path):
    shutil.copytree(world.folder / "run/model", tmp_path / "model")
    step = next((world.folder / "run/checkpoints").glob("*08"))
    for name in (tmp_path / "model", world.folder / "run", step):
        assert main(["eval", str(name), "--tasks", "small_piqa", "--task-folder", task_folder, "--limit", "2"]) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "model.evaluations.json"]
    content = json.loads((tmp_path / "model.evaluations.json").read_text())
    assert content["origin"]["settings"]["limit"] == 2 and set(content["tasks"]) == {"small_piqa"}
    results = world.folder / "run/evaluations"
    assert sorted(entry.name for entry in results.iterdir()) == [f"checkpoints-{step.name}.json", "model.json"]
    assert world.train("run", resume=True) == 0  # a run does not mind them


def test_shots_come_before_the_question(world, options, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    lengths, original = [], HFLM._model_call
    monkeypatch.setattr(
        HFLM,
        "_model_call",
        lambda self, ids, *more, **settings: (lengths.append(ids.shape[1]), original(self, ids, *more, **settings))[1],
    )

    def longest(shots):
        lengths.clear()
        evaluate_tasks([str(world.folder / "run")], replace(options, names=("small_piqa",), shots=shots))
        return max(lengths)

    assert longest(0) < longest(2) == SEQ_LEN


def test_several_checkpoints_of_token_files_too(world, capsys):
    assert main(["eval", str(world.folder / "run"), str(world.folder / "run/model")]) == 0
    assert capsys.readouterr().out.count("validation loss") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--tasks", "small_lambda", "--task-folder", "TASKS"],
            "there is no task small_lambda; did you mean",
            marks=pytest.mark.slow,
        ),  # reads all tasks that come with the harness
        (["--tasks", "small_piqa", "--task-folder", "OUT/nowhere"], "--task-folder: there is no folder"),
        (["--tasks", "broken", "--task-folder", "OUT/broken"], "the task broken cannot be loaded: "),
    ],
)
def test_tasks_that_are_not_there_are_one_line_and_exit_code_2(world, task_folder, capsys, arguments, message):
    broken = world.folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "broken.yaml").write_text(
        _COMMON.format(name="broken", folder=broken, kind="multiple_choice") + TASKS["small_piqa"][2]
    )
    arguments = [text.replace("TASKS", task_folder).replace("OUT", str(world.folder)) for text in arguments]
    assert main(["eval", str(world.folder / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cocomix eval: error: ") and message in error


def test_without_the_harness_it_says_what_to_install(world, options, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(CocomixError, match=r"--tasks needs lm-evaluation-harness: pip install 'cocomix\[eval\]'"):
        evaluate_tasks([str(world.folder / "run")], options)
