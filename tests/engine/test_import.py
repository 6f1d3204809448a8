"""What importing cocomix does. Every case runs in an interpreter of its own."""

import json
import subprocess
import sys

import pytest
from model_helpers import batch, small_model

HEAVY = {"torch", "deepspeed", "triton", "transformers", "datasets", "matplotlib", "tensorboard", "wandb"}


def python(code):
    """Standard output of a fresh interpreter, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code):
    """The heavy modules that a fresh interpreter holds after this code."""
    loaded = python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return HEAVY & set(json.loads(loaded.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import cocomix",
        "import cocomix.cli",
        "from cocomix.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass",
        "import cocomix.core.config, cocomix.core.errors, cocomix.core.files, cocomix.core.flops",
        "import cocomix; dir(cocomix); cocomix.__all__",
    ],
)
def test_importing_loads_nothing_heavy(code):
    assert modules_after(code) == set()


def test_the_model_needs_no_training_libraries():
    loaded = modules_after("import cocomix; cocomix.CoCoMixForCausalLM")
    assert not loaded & {"deepspeed", "datasets", "matplotlib"}


def test_every_public_name_is_there():
    names = json.loads(
        python(
            "import cocomix, json\n"
            "print(json.dumps({name: getattr(cocomix, name).__name__ for name in cocomix.__all__}))"
        )
    )
    assert names == {name: name for name in names}
    assert {"CoCoMixConfig", "CoCoMixForCausalLM", "SparseAutoencoder", "ConceptTeacher", "LabelCache"} <= set(names)


def test_the_version_is_that_of_the_installation():
    import importlib.metadata

    import cocomix

    assert cocomix.__version__ == importlib.metadata.version("cocomix")


def test_an_unknown_name_is_an_attribute_error():
    import cocomix

    with pytest.raises(AttributeError, match="module 'cocomix' has no attribute 'Nothing'"):
        cocomix.Nothing  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM\nimport cocomix",
        "import cocomix\nfrom transformers import AutoModelForCausalLM",
    ],
)
def test_transformers_knows_the_model_whichever_is_imported_first(tmp_path, imports):
    model = small_model()
    model.save_pretrained(tmp_path)
    ids, _ = batch(model.config)
    printed = python(f"""{imports}
import json, torch
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
logits = model(torch.tensor({ids.tolist()})).logits
print(json.dumps([type(model).__module__, type(model).__name__, logits.tolist()]))""")
    module, name, logits = json.loads(printed.splitlines()[-1])
    assert (module, name) == ("cocomix.model.model", "CoCoMixForCausalLM")
    expected = model(ids).logits
    assert (expected.new_tensor(logits) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
@pytest.mark.parametrize("start", [["-m", "cocomix"], ["-m", "cocomix.cli"]])
def test_help_exits_with_zero(start, arguments):
    done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr


def test_bad_input_exits_with_two_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "cocomix", "train", "/no/such.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == "cocomix train: error: no config file at /no/such.yaml\n"
