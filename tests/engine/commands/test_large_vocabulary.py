"""Every command with a tokenizer of more ids than two bytes hold."""

import random

import numpy as np
import pytest
from run_helpers import LATENTS, SEQ_LEN, World
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cocomix.cli import main
from cocomix.data.token_files import TokenFiles
from cocomix.teacher.label_cache import LabelCache
from cocomix.teacher.soft_target_cache import SoftTargetCache

N_WORDS = 70_000
EOT = "<|endoftext|>"
DISTILLED = ("distillation.weight=1", "distillation.top_k=4")


def documents():
    """Words whose ids lie on both sides of 65,536."""
    draw = random.Random(0)
    return [[draw.choice((3, 70, 4000, 65_534, 65_535, 65_536, 69_998)) for _ in range(300)] for _ in range(12)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("wide"))
    vocabulary = {f"w{number}": number for number in range(N_WORDS)} | {EOT: N_WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT)
    fast.save_pretrained(world.folder / "tokenizer")
    (world.folder / "words").mkdir()
    for number, ids in enumerate(documents()):
        (world.folder / f"words/{number:02}.txt").write_text(" ".join(f"w{i}" for i in ids))
    settings = f"data: {{text: [{world.folder}/words], tokenizer: {world.folder}/tokenizer}}\n"
    (world.folder / "wide.yaml").write_text(f"base: config.yaml\n{settings}")
    world.config = world.folder / "wide.yaml"
    assert main(["data", str(world.config), f"data.folder={world.folder}/wide"]) == 0
    world.config.write_text(world.config.read_text().replace("data: {", f"data: {{folder: {world.folder}/wide, "))
    world.add_teacher(vocab_size=N_WORDS + 1)
    return world


def call(world, command, *overrides):
    return main([command, str(world.config), *overrides])


def test_token_files_are_four_bytes_a_token_and_say_so(world):
    files = TokenFiles.open(world.folder / "wide")
    assert (files.meta.dtype, files.vocab_size, files.eot_id) == ("uint32", N_WORDS + 1, N_WORDS)
    stored = np.concatenate([np.fromfile(files.folder / f"{name}.bin", "<u4") for name in ("train", "val")])
    expected = [token for ids in documents() for token in (*ids, N_WORDS)]
    assert sorted(stored.tolist()) == sorted(expected)
    split = files.split("train")
    first = np.fromfile(files.folder / "train.bin", "<u4")[:SEQ_LEN]
    assert np.array_equal(split.window(0, SEQ_LEN), first) and split.n_tokens * 4 == split.path.stat().st_size
    assert call(world, "data") == 0
    assert main(["data", str(world.config), "--verify"]) == 0


def test_more_processes_make_the_same_tokens(world, tmp_path):
    assert call(world, "data", f"data.folder={tmp_path}/data", "data.processes=2") == 0
    made = [(folder / "train.bin").read_bytes() for folder in (world.folder / "wide", tmp_path / "data")]
    assert made[0] == made[1]


@pytest.mark.slow
def test_labels_soft_targets_and_runs_are_made_of_it(world, tmp_path, capsys):
    sae, cache, soft = f"teacher.sae={tmp_path}/sae", f"concept_labels.cache={tmp_path}/labels", tmp_path / "soft"
    assert call(world, "sae", sae) == 0
    assert call(world, "labels", sae, cache, *DISTILLED, f"distillation.cache={soft}") == 0
    assert LabelCache.open(tmp_path / "labels").window(0).max() < LATENTS
    cached = SoftTargetCache.open(soft)
    ids = np.concatenate([cached.window(index)["soft_target_ids"] for index in range(cached.n_windows)])
    assert ids.min() >= 0 and 65_536 < ids.max() <= N_WORDS
    assert world.train("online", sae, *DISTILLED, "model.concept_topk=4") == 0
    assert world.train("cached", sae, cache, *DISTILLED, f"distillation.cache={soft}") == 0
    losses = [[line["loss"] for line in world.records(run, "train")] for run in ("online", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    run = str(world.folder / "cached")
    model = AutoModelForCausalLM.from_pretrained(f"{run}/model")
    assert model.config.vocab_size >= N_WORDS + 1
    assert main(["eval", run]) == 0
    assert main(["eval", run, "--text", str(world.folder / "words/00.txt")]) == 0
    capsys.readouterr()
    assert main(["generate", run, "--prompt", "w65536 w69998", "--max-new-tokens", "3"]) == 0
    assert "w65536 w69998" in capsys.readouterr().out.replace("\n", " ")
    words = str(world.folder / "words/00.txt")
    assert main(["concepts", run, words, "--max-tokens", "64", "--out", str(tmp_path / "page.html")]) == 0
    assert main(["report", run, "--out", str(tmp_path / "report")]) == 0
    assert main(["export", run, str(tmp_path / "exported")]) == 0
