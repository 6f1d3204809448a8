"""`cocomix generate`: the texts, the comparison, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from run_helpers import LATENTS, SEQ_LEN
from usable_helpers import error_of, make_run, world_of_runs

import cocomix
from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.inference.generate import Comparison, Sampling, compare, comparison_lines, continue_texts, parse_steering
from cocomix.inference.loading import load_usable
from cocomix.inference.steering import steer

PROMPTS = ["the quick", "a cat jumps over the fox"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def usable(world):
    return load_usable(world.folder / "run")


def generate(world, *arguments, model="run"):
    return main(["generate", str(world.folder / model), *arguments])


def greedy_by_hand(usable, prompt, n):
    """The prompt and n tokens (fewer where the text ends), one whole forward pass each."""
    ids = usable.tokenizer(prompt)["input_ids"]
    for _ in range(n):
        ids.append(usable.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == usable.tokenizer.eos_token_id:
            break
    return usable.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_prompt_is_continued_greedily(world, usable, capsys):
    assert generate(world, "--prompt", PROMPTS[0], "--max-new-tokens", "6") == 0
    text = greedy_by_hand(usable, PROMPTS[0], 6)
    assert capsys.readouterr().out == text + "\n" and text.startswith(PROMPTS[0]) and len(text) > len(PROMPTS[0])
    assert generate(world, "--prompt", PROMPTS[0], "--max-new-tokens", "6", model="run/model") == 0
    assert capsys.readouterr().out == text + "\n"


def test_several_prompts_are_one_batch_and_each_goes_on_as_it_would_alone(usable):
    sampling = Sampling(max_new_tokens=6)
    with steer(usable.model, {3: "force:4"}):
        together = continue_texts(usable, PROMPTS, sampling)
        assert together == [greedy_by_hand(usable, prompt, 6) for prompt in PROMPTS]
    assert together != continue_texts(usable, PROMPTS, sampling)


def test_a_steered_text_is_that_of_the_context_manager_and_says_so(world, usable, capsys):
    assert (
        generate(world, "--prompt", PROMPTS[0], "--max-new-tokens", "6", "--steer", "3=force:40", "--steer", "9=-2")
        == 0
    )
    with cocomix.steer(usable.model, {3: "force:40", 9: -2}):
        expected = greedy_by_hand(usable, PROMPTS[0], 6)
    assert capsys.readouterr().out == f"[steered: 3 force:40, 9 x-2]\n\n{expected}\n"
    assert expected != greedy_by_hand(usable, PROMPTS[0], 6)


def test_samples_depend_on_the_seed_and_on_nothing_else(usable):
    def sample(**options):
        torch.rand(3)
        return continue_texts(usable, PROMPTS, Sampling(**{"max_new_tokens": 6, "temperature": 3.0, **options}))

    state = torch.get_rng_state()
    first = sample(seed=1)
    torch.set_rng_state(state)
    torch.rand(3)
    after = torch.get_rng_state()
    assert sample(seed=1) == first != sample(seed=2)
    torch.set_rng_state(state)
    sample(seed=1)
    assert torch.equal(torch.get_rng_state(), after)  # the program's own random numbers go on as if nothing happened
    first_tokens = continue_texts(usable, ["the"] * 300, Sampling(max_new_tokens=1, temperature=1e4))
    assert len(set(first_tokens)) > 100  # of 300 ids: there is no other limit than top_p
    greedy = continue_texts(usable, PROMPTS, Sampling(max_new_tokens=6))
    assert sample(top_p=1e-6) == greedy and sample(temperature=1e-4) == greedy and first != greedy


def test_beams_are_a_beam_search(usable):
    [text] = continue_texts(usable, PROMPTS[:1], Sampling(max_new_tokens=4, beams=8))
    ids = torch.tensor([usable.tokenizer(PROMPTS[0])["input_ids"]])
    out = usable.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, num_beams=8, do_sample=False, pad_token_id=0
    )
    assert text == usable.tokenizer.decode(out[0], skip_special_tokens=True)
    assert text != greedy_by_hand(usable, PROMPTS[0], 4)


def test_a_prompt_that_is_no_utf_8_is_one_line(world, capsys):
    assert generate(world, "--prompt", "a\udcffb") == 2
    assert r"the prompt 'a\udcffb' is not UTF-8" in error_of(capsys, "generate")


def test_an_empty_prompt_starts_a_document(usable):
    [text] = continue_texts(usable, [""], Sampling(max_new_tokens=3))
    ids = torch.tensor([[usable.tokenizer.eos_token_id]])
    for _ in range(3):
        ids = torch.cat([ids, usable.model(ids).logits[:, -1:].argmax(-1)], 1)
    assert text == usable.tokenizer.decode(ids[0], skip_special_tokens=True)


# --- comparison


def test_a_comparison_measures_the_change_of_the_next_token(usable):
    concepts = {3: "force:40"}
    [result] = compare(usable, PROMPTS[1:], Sampling(max_new_tokens=5), lambda: steer(usable.model, concepts))
    ids = torch.tensor([usable.tokenizer(PROMPTS[1])["input_ids"]])
    p = usable.model(ids).logits[0].double().softmax(-1)
    with steer(usable.model, concepts):
        q = usable.model(ids).logits[0].double().softmax(-1)
        steered_text = greedy_by_hand(usable, PROMPTS[1], 5)
    assert result.texts == (greedy_by_hand(usable, PROMPTS[1], 5), steered_text)
    kl = (q * (q / p).log()).sum(-1)
    assert result.kl == pytest.approx(kl[-1].item(), rel=1e-4) and result.kl > 0.01
    assert result.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4) and result.n_positions == ids.shape[1]
    change = q[-1] - p[-1]
    for rows, best in ((result.gained, change.argmax().item()), (result.lost, change.argmin().item())):
        assert rows[0][0] == usable.tokenizer.decode([best])
        assert rows[0][1:] == pytest.approx((p[-1, best].item(), q[-1, best].item()), rel=1e-4)
        sizes = [abs(after - before) for _, before, after in rows]
        assert sizes == sorted(sizes, reverse=True) and len(rows) == 8
    assert all(after > before for _, before, after in result.gained)
    assert all(after < before for _, before, after in result.lost)


def test_steering_that_changes_nothing_compares_as_equal(usable):
    [result] = compare(usable, PROMPTS[:1], Sampling(max_new_tokens=4), lambda: steer(usable.model, {3: 1.0}))
    assert result.kl == result.mean_kl == 0 and not result.gained and not result.lost
    assert result.texts[0] == result.texts[1]


def test_the_comparison_stands_side_by_side_within_the_terminal():
    result = Comparison(
        ("one two three\n\tfour " + "x" * 80, "five"),
        0.25,
        0.125,
        3,
        [("\n", 0.1, 0.6), ("a very long token " * 4, 0.0, 0.05)],
        [("b", 0.5, 0.1)],
    )
    lines = comparison_lines(result, width=70)
    assert all(len(line) <= 70 for line in lines)
    assert lines[0].split(" | ")[0].strip() == "as it is" and lines[0].split(" | ")[1] == "steered"
    assert [part.strip() for part in lines[2].split(" | ")] == ["one two three", "five"]
    left = "".join(line.split(" | ")[0].rstrip().removesuffix(" |") for line in lines[3:6])
    assert left.count("x") == 80
    assert "KL(steered || as it is) = 0.2500 nats; 0.1250 on average" in " ".join(lines)
    assert re.search(r"'\\n' +0\.1000 +0\.6000 \| 'b' +0\.5000 +0\.1000", "\n".join(lines))


def test_compare_shows_the_model_and_its_teacher(world, usable, capsys):
    assert (
        generate(
            world, "--prompt", PROMPTS[0], "--max-new-tokens", "5", "--steer", "5=set:30", "--compare", "--teacher"
        )
        == 0
    )
    out = capsys.readouterr().out
    model, teacher = re.split(r"=== the teacher, steered: 5 set:30; prompt: 'the quick'\n", out)
    assert model.startswith("=== the model, steered: 5 set:30; prompt: 'the quick'\n")
    kls = [float(re.search(r"KL\(steered \|\| as it is\) = ([\d.]+) nats", part)[1]) for part in (model, teacher)]
    assert min(kls) > 0.001 and kls[0] != kls[1]
    assert (
        generate(
            world,
            "--prompt",
            PROMPTS[0],
            "--max-new-tokens",
            "5",
            "--steer",
            "5=set:30",
            "--compare",
            "--teacher-config",
            str(world.config),
            model="run/model",
        )
        == 0
    )
    assert capsys.readouterr().out == out


def test_a_name_stands_for_its_concept(world, tmp_path, capsys):
    shutil.copytree(world.folder / "run", tmp_path / "run")
    (tmp_path / "run/model/concept_names.json").write_text(json.dumps({"5": "the end", "9": "x"}))
    assert (
        main(["generate", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "3", "--steer", "the end=2"])
        == 0
    )
    assert capsys.readouterr().out.startswith('[steered: 5 "the end" x2]\n')
    with pytest.raises(CocomixError, match="names: the end, x"):
        parse_steering(["end=2"], {5: "the end", 9: "x"})
    (tmp_path / "run/model/concept_names.json").write_text(json.dumps({"five": "the end"}))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "the"]) == 2
    assert "concept_names.json is broken at 'five'" in error_of(capsys, "generate")


# --- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steer", f"{LATENTS}=2"], f"no concept {LATENTS}: this model has the concepts 0 to {LATENTS - 1}"),
        (["--steer=-1=2"], "no concept -1"),
        (["--steer", "3=much"], "'much' is not a steering strength"),
        (["--steer", "3=nan"], "'nan' is not a steering strength"),
        (["--steer", "3"], "--steer 3: expected ID=OPERATION: ID=F or ID=xF multiplies"),
        (["--steer", "3=1", "--steer", "3=2"], "--steer names concept 3 twice"),
        (["--steer", "quotes=1"], "'quotes' is neither the number of a concept nor a name"),
        ([f"--steer={j}=force" for j in range(5)], "5 concepts are forced, but the model keeps 4"),
        (
            ["--prompt", "the cat " * 20],
            f"tokens and 4 more are wanted, but the model's context holds {SEQ_LEN}: shorten",
        ),
        (
            ["--max-new-tokens", "17"],
            r"the prompt has 3 tokens and 17 more are wanted, but the model's context holds 16: "
            r"ask for at most 13",
        ),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "1e-300"], r"--temperature is 1e-300: expected 0 \(greedy\) or at least 0.0001"),
        (["--steer", "3=force:1e39"], r"'1e39' is not a steering strength: expected a number up to 1e\+30"),
        (["--temperature", "1", "--top-p", "0"], "--top-p is 0.0"),
        (["--top-p", "0.9"], "--top-p needs sampling"),
        (["--compare"], "say with --steer what to change"),
        (["--steer", "3=1", "--teacher"], "give --compare too"),
        (["--steer", "3=1", "--compare", "--teacher-config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(world, capsys, arguments, message):
    assert generate(world, "--prompt", "the cat", "--max-new-tokens", "4", *arguments) == 2
    assert re.search(message, error_of(capsys, "generate"))


def test_models_of_another_kind_are_refused(world, tmp_path, capsys):
    few = ["--prompt", "the", "--max-new-tokens", "3"]
    assert generate(world, *few, model="plain") == 0
    assert capsys.readouterr().out.startswith("the")
    assert generate(world, *few, "--steer", "1=2", model="plain") == 2
    assert "mixes no concepts in (a cocomix model with mixing=none)" in error_of(capsys, "generate")
    assert generate(world, *few, model="data") == 2
    assert "holds no model" in error_of(capsys, "generate")
    assert generate(world, *few, model="teacher") == 2
    assert "tokenizer" in error_of(capsys, "generate")
    shutil.copytree(world.folder / "run", tmp_path / "run")
    (tmp_path / "run/run.json").unlink()
    assert main(["generate", str(tmp_path / "run"), *few, "--steer", "1=2", "--compare", "--teacher"]) == 2
    assert "does not say which teacher and SAE" in error_of(capsys, "generate")


def test_a_tokenizer_that_is_not_the_models_is_refused(world, capsys):
    for vocab_size in (280, 900):
        folder = make_run(world, f"foreign-{vocab_size}", vocab_size=vocab_size)
        assert main(["generate", str(folder), "--prompt", "the"]) == 2
        assert re.search(
            rf"tokenizer of \d+ ids, but its model was made for {vocab_size}", error_of(capsys, "generate")
        )


def test_a_teacher_that_does_not_fit_the_model_is_refused(world, capsys):
    world.add_teacher("teacher-small", "sae-small", latents=48)
    world.add_teacher("teacher-few", "sae-few", vocab_size=200)
    for changes, message in (
        ({"model": "teacher-small", "sae": "sae-small"}, "48 latents but the model 64 concepts"),
        ({"model": "teacher-few", "sae": "sae-few"}, "knows 200 ids, fewer than"),
    ):
        folder = make_run(world, "other-teacher")
        info = json.loads((folder / "run.json").read_text())
        info["config"]["teacher"] |= {key: str(world.folder / name) for key, name in changes.items()}
        (folder / "run.json").write_text(json.dumps(info))
        assert (
            main(
                [
                    "generate",
                    str(folder),
                    "--prompt",
                    "the",
                    "--max-new-tokens",
                    "3",
                    "--steer",
                    "1=2",
                    "--compare",
                    "--teacher",
                ]
            )
            == 2
        )
        assert message in error_of(capsys, "generate")
