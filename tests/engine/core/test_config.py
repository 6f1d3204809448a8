import dataclasses
import re
from pathlib import Path

import pytest

from cocomix.core.config import ConceptLabelsConfig, Config, load_config
from cocomix.core.errors import CocomixError

FOLDER = Path(__file__).parents[3] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("**/*.yaml") if path.parent.name != "clusters")  # these describe machines


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return its path."""

    def write_file(text, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def load(path, *overrides):
    return load_config(path, list(overrides))


# --- reading


def test_an_empty_file_gives_the_defaults(write):
    assert load(write("")) == Config()


def test_a_file_changes_what_it_names_and_nothing_else(write):
    config = load(write("train:\n  lr: 1e-3\n  run: here\ndata:\n  text: [a, b]\n"))
    expected = Config()
    expected.train.lr, expected.train.run, expected.data.text = 1e-3, "here", ["a", "b"]
    assert config == expected
    assert isinstance(config.train.lr, float)


def test_settings_are_plain_objects(write):
    config = load(write("data: {text: [a]}\ndeepspeed: {zero_optimization: {offload: [1, {a: b}]}}\n"))
    assert type(config.data.text) is list
    assert config.deepspeed == {"zero_optimization": {"offload": [1, {"a": "b"}]}}
    assert type(config.deepspeed["zero_optimization"]) is dict
    assert dataclasses.is_dataclass(config.train)


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(write):
    path = write("train:\n  lr: 1e-3\n  seed: 4\n")
    config = load(
        path,
        "train.lr=2e-3",
        "train.lr=3e-3",
        "data.text=[x,y]",
        "teacher.model=null",
        "train.tensorboard=false",
        "deepspeed.wall_clock_breakdown=true",
        "train.run=a=b",
    )
    assert (config.train.lr, config.train.seed, config.data.text) == (3e-3, 4, ["x", "y"])
    assert config.teacher.model is None and config.train.tensorboard is False
    assert config.deepspeed == {"wall_clock_breakdown": True}
    assert config.train.run == "a=b"


def test_paths_may_start_with_out_wherever_it_is_set(write):
    path = write("data: {folder: '${out}/data'}\nteacher: {model: '${out}/${model.n_layer}'}\n")
    assert load(path).data.folder == "runs/data"
    assert load(path, "out=/big/disk").data.folder == "/big/disk/data"
    assert load(path, "out=x").teacher.model == "x/8"
    assert load(path, "concept_labels.cache=${out}/labels").concept_labels.cache == "runs/labels"


def test_a_file_changes_what_its_base_sets(write):
    write("out: low\nmodel: {n_embd: 32, n_layer: 4}\ntrain: {run: '${out}/run'}\n", "sub/lowest.yaml")
    write("base: sub/lowest.yaml\nmodel: {n_layer: 5}\n", "middle.yaml")
    config = load(write("base: middle.yaml\nout: top\ndata: {text: [t]}\n"))
    assert (config.model.n_embd, config.model.n_layer, config.train.run) == (32, 5, "top/run")
    assert config.data.text == ["t"]


def test_derived_figures(write):
    config = load(write("data: {seq_len: 128}\ntrain: {tokens: 10_001, global_batch: 8, micro_batch: 4}\n"))
    assert (config.tokens_per_step, config.total_steps) == (1024, 10)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path):
    assert isinstance(load(path), Config)


def test_there_are_configs_to_load():
    assert CONFIGS


# --- unknown keys, wrong types


@pytest.mark.parametrize(
    "text, message",
    [
        ("trian: {lr: 1}", "unknown key trian; did you mean train?"),
        ("train: {warmup_step: 1}", "unknown key train.warmup_step; did you mean train.warmup_steps?"),
        ("model: {n_heads: 1}", "unknown key model.n_heads; did you mean model.n_head?"),
        ("concept_labels: {zzz: 1}", "unknown key concept_labels.zzz; known keys: cache, shard_windows"),
        ("1: 2", "unknown key 1; known keys: out, data, model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(write, text, message):
    path = write(text)
    with pytest.raises(CocomixError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: {message}")


def test_an_unknown_key_in_an_override_is_refused(write):
    with pytest.raises(CocomixError, match=r"override 'train\.lrr=1': unknown key train\.lrr; did you mean train\.lr"):
        load(write(""), "train.lrr=1")


def test_an_unknown_key_is_reported_for_the_file_that_holds_it(write):
    base = write("model: {n_embed: 3}", "base.yaml")
    with pytest.raises(CocomixError, match=f"^{base}: unknown key model.n_embed; did you mean model.n_embd"):
        load(write("base: base.yaml\n"))


@pytest.mark.parametrize(
    "text, key",
    [
        ("model: {n_layer: many}", "model.n_layer"),
        ("model: {n_layer: 1.5}", "model.n_layer"),
        ("train: {lr: [1]}", "train.lr"),
        ("train: {tensorboard: maybe}", "train.tensorboard"),
        ("data: {text: {a: b}}", "data.text"),
        ("train: {lr: null}", "train.lr"),
        ("deepspeed: 3", "deepspeed"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(write, text, key):
    path = write(text)
    with pytest.raises(CocomixError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: {key}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "override, wanted",
    [
        ("data.text=stdlib", "data.text: expected a list, such as [stdlib]"),
        ("data.tokens=a.bin", "data.tokens: expected a list, such as [a.bin]"),
        ("data.text=3", "data.text: expected a list, such as [3]"),
        ("data.text={a: b}", "data.text: expected a list, such as [{'a': 'b'}]"),
        ("deepspeed=[1]", "deepspeed: expected a mapping"),
        ("deepspeed=3", "deepspeed: expected a mapping"),
    ],
)
def test_what_should_be_a_list_or_a_mapping_is_said(write, override, wanted):
    with pytest.raises(CocomixError) as raised:
        load(write(""), override)
    assert str(raised.value) == f"override {override!r}: {wanted}"


def test_a_list_may_be_that_of_another_setting(write):
    assert load(write("data: {text: [a, b], tokens: '${data.text}'}")).data.tokens == ["a", "b"]


@pytest.mark.parametrize("text", ["model: 3", "model:", "model: [1]", "model: '${nothing}'"])
def test_a_section_that_is_no_section_is_refused(write, text):
    with pytest.raises(CocomixError, match="model"):
        load(write(text))


def test_an_interpolation_that_leads_nowhere_is_refused(write):
    for text in ("data: {folder: '${nothing}/x'}", "data: {folder: '${out'}", "data: {folder: '${data.folder}'}"):
        with pytest.raises(CocomixError, match=r"config\.yaml"):
            load(write(text))


# --- sections by the names that they had in earlier versions


@pytest.mark.parametrize("text, overrides", [("labels: {cache: '${out}/here'}", []), ("", ["labels.cache=runs/here"])])
def test_an_earlier_name_of_a_section_is_read_and_told_in_a_line(write, capsys, text, overrides):
    path = write(text)
    assert load(path, *overrides, "labels.shard_windows=8").concept_labels == ConceptLabelsConfig("runs/here", 8)
    where = "override 'labels.cache=runs/here'" if overrides else path
    told = f"note: {where}: `labels` is called `concept_labels` now; the old name is still read\n"
    assert capsys.readouterr() == ("", told)


def test_a_later_source_may_use_the_current_name(write, capsys):
    write("labels: {cache: one, shard_windows: 8}", "base.yaml")
    path = write("base: base.yaml\nconcept_labels: {cache: two}")
    assert load(path).concept_labels == ConceptLabelsConfig("two", 8)
    assert load(path, "concept_labels.cache=three").concept_labels == ConceptLabelsConfig("three", 8)
    assert capsys.readouterr().err.count("\n") == 2


def test_one_rank_alone_tells_of_an_earlier_name(write, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert load(write("labels: {cache: one}")).concept_labels.cache == "one"
    assert capsys.readouterr() == ("", "")


def test_a_section_by_both_names_is_refused(write):
    path = write("labels: {cache: one}\nconcept_labels: {cache: two}")
    with pytest.raises(
        CocomixError, match=f"^{path}: `labels` is an old name of `concept_labels`: use concept_labels a"
    ):
        load(path)
    with pytest.raises(CocomixError, match="^overrides: `labels` is an old name of `concept_labels`"):
        load(write(""), "labels.cache=one", "concept_labels.shard_windows=2")


# --- files and overrides that cannot be read


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(CocomixError, match=f"no config file at {path}"):
            load(path)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t- x", "3", "a: 1\na: 2"])
def test_a_file_that_is_no_yaml_is_named(write, text):
    with pytest.raises(CocomixError, match="config.yaml"):
        load(write(text))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CocomixError, match="config.yaml is not valid YAML"):
        load(tmp_path / "config.yaml")


def test_a_list_is_no_config(write):
    with pytest.raises(CocomixError, match="holds no settings: expected sections such as"):
        load(write("- a\n- b\n"))


def test_a_missing_base_is_named(write, tmp_path):
    with pytest.raises(CocomixError, match=f"no config file at {tmp_path / 'none.yaml'}"):
        load(write("base: none.yaml"))


@pytest.mark.parametrize("base", ["3", "[a]", "{a: b}"])
def test_a_base_that_is_no_path_is_refused(write, base):
    with pytest.raises(CocomixError, match="config.yaml: `base:` must name a file"):
        load(write(f"base: {base}"))


def test_bases_that_lead_back_are_refused(write):
    one = write("base: two.yaml", "one.yaml")
    write("base: one.yaml", "two.yaml")
    for path in (one, write("base: self.yaml", "self.yaml")):
        with pytest.raises(CocomixError, match="its `base:` leads back to itself"):
            load(path)


@pytest.mark.parametrize("override", ["train.lr", "=3", "", "train"])
def test_an_override_without_key_or_value_is_refused(write, override):
    with pytest.raises(CocomixError, match="expected key.sub=value, for example train.lr=3e-4"):
        load(write(""), override)


@pytest.mark.parametrize("override", ["train=3", "train.lr.x=3", "train.lr=[", "train.lr={", "base=other.yaml"])
def test_an_override_that_does_not_fit_is_named(write, override):
    with pytest.raises(CocomixError) as raised:
        load(write(""), override)
    assert str(raised.value).startswith(f"override {override!r}: ")


@pytest.mark.parametrize("text", ["a: [", "out: x\na: b: c"])
def test_what_is_no_yaml_is_named_with_its_line_in_one(write, text):
    path = write(text)
    with pytest.raises(CocomixError) as raised:
        load(path)
    assert re.fullmatch(rf"{path}, line [12], column \d: this is not valid YAML: .+", str(raised.value))


def test_a_file_that_cannot_be_read_is_not_called_bad_yaml(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(CocomixError, match="loop.yaml"):
        load(tmp_path / "loop.yaml")


# --- names are kept as they are


@pytest.mark.parametrize(
    "name", ["a ", " a", "a\nb", "a\n", "007", "1e3", "1_0", "true", "a #b", "a: b", "[a", "x\x1b"]
)
def test_a_name_in_an_override_is_taken_as_it_stands(write, name):
    assert load(write(""), f"train.run={name}").train.run == name
    assert load(write(""), "out=o", f"data.folder=${{out}}/{name}").data.folder == f"o/{name}"
    assert load(write(""), f"labels.cache={name}").concept_labels.cache == name


def test_a_name_in_quotes_is_read_as_yaml_and_null_is_none(write):
    assert load(write(""), "train.run='a '").train.run == "a "
    assert load(write(""), 'train.run="a\\nb"').train.run == "a\nb"
    assert load(write("concept_labels: {cache: here}"), "concept_labels.cache=null").concept_labels.cache is None
    with pytest.raises(CocomixError, match="train.run"):
        load(write(""), "train.run=null")


@pytest.mark.parametrize("value", ["007", "1e3", "2024_01", "true"])
def test_a_name_that_yaml_reads_as_something_else_is_refused(write, value):
    path = write(f"train: {{run: {value}}}")
    with pytest.raises(CocomixError, match="train.run is .* to YAML: put it into quotes"):
        load(path)
    assert load(write(f"train: {{run: '{value}'}}")).train.run == value


def test_an_override_that_is_no_utf_8_is_one_line(write):
    with pytest.raises(CocomixError, match="this is not UTF-8"):
        load(write(""), "train.run=\udcff")


# --- values that contradict each other


POSITIVE = [
    "data.vocab_size",
    "model.n_embd",
    "model.n_layer",
    "model.n_head",
    "model.concept_dim",
    "model.concept_topk",
    "sae.n_latents",
    "sae.k",
    "sae.tokens",
    "sae.batch_tokens",
    "sae.lr",
    "sae.dead_after_tokens",
    "train.tokens",
    "train.global_batch",
    "train.micro_batch",
    "train.lr",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.grad_clip",
    "train.timeout_minutes",
    "train.eps",
    "concept_labels.shard_windows",
    "teacher.label_topk",
]


@pytest.mark.parametrize("key", POSITIVE)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_what_must_be_positive_is(write, key, value):
    path = write("")
    with pytest.raises(CocomixError, match=f"^{path}: {key} must be positive$"):
        load(path, f"{key}={value}")


@pytest.mark.parametrize(
    "key",
    [
        "train.weight_decay",
        "train.warmup_steps",
        "train.eval_windows",
        "model.concept_loss_weight",
        "sae.warmup_steps",
        "sae.aux_k",
        "sae.aux_weight",
        "teacher.layer",
    ],
)
def test_what_must_not_be_negative_is_not(write, key):
    path = write("")
    load(path, f"{key}=0")
    with pytest.raises(CocomixError, match=f"^{path}: {key} must not be negative$"):
        load(path, f"{key}=-1")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_that_are_none_are_refused(write, value):
    for key in ("train.lr", "train.weight_decay", "model.concept_loss_weight"):
        with pytest.raises(CocomixError, match=key):
            load(write(f"{key.split('.')[0]}: {{{key.split('.')[1]}: {value}}}"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.seq_len=1"], "data.seq_len must be at least 2: a window needs a next token to predict"),
        (["data.val_fraction=0"], "data.val_fraction must lie between 0 and 1"),
        (["data.val_fraction=1"], "data.val_fraction must lie between 0 and 1"),
        (["data.vocab_size=2147483649"], "data.vocab_size must be at most 2147483648: token files hold 32 bits"),
        (["model.mixing=both"], "model.mixing is 'both'; it must be one of interleave, add, predict, pause, none"),
        (["model.n_embd=510"], "model.n_embd (510) must be a multiple of model.n_head (8)"),
        (
            ["model.mixing=add", "model.concept_residual=true"],
            "model.concept_residual needs concept positions, which model.mixing=add does not have",
        ),
        (
            ["model.mixing=predict", "model.concept_every=2"],
            "model.concept_every needs concept positions, which model.mixing=predict does not have",
        ),
        (
            ["model.concept_every=9", "data.seq_len=8"],
            "model.concept_every (9) must be at most data.seq_len (8): no window would have a concept position",
        ),
        (["model.n_embd=1", "model.n_head=1"], "model.n_embd must be at least 2: concepts are scaled to the spread"),
        (["distillation.weight=1e31"], "distillation.weight must be at most 1e+30: losses are numbers of 32 bits"),
        (["model.n_layer=65537"], "model.n_layer must be at most 65536: a model's weights are listed"),
        (["model.insert_layer=8"], "model.insert_layer (8) must be at least 0 and below model.n_layer (8)"),
        (["model.insert_layer=-1"], "model.insert_layer (-1) must be at least 0 and below model.n_layer (8)"),
        (["model.concept_dim=31"], "model.concept_topk (32) must be at most model.concept_dim (31)"),
        (["model.concept_dim=65536"], "model.concept_dim must be at most 65535: label caches hold uint16"),
        (["train.precision=fp16"], "train.precision is 'fp16'; it must be one of fp32, bf16, auto"),
        (["teacher.dtype=fp16"], "teacher.dtype is 'fp16'; it must be one of fp32, bf16, auto"),
        (["train.zero_stage=4"], "train.zero_stage is 4; it must be 0, 1, 2 or 3"),
        (["train.zero_stage=0", "train.precision=bf16"], "train.precision=bf16 needs train.zero_stage 1, 2 or 3"),
        (["train.zero_stage=0", "train.offload_optimizer=true"], "train.offload_optimizer needs train.zero_stage 1, 2"),
        (
            ["train.attention_backend=flex"],
            "train.attention_backend is 'flex'; it must be null or one of torch, triton",
        ),
        ([f"train.seed={2**64}"], "train.seed must fit into 64 bits"),
        ([f"sae.seed={-(2**63) - 1}"], "sae.seed must fit into 64 bits"),
        (["train.timeout_minutes=1e300"], "train.timeout_minutes must be at most 525600: that is a year"),
        (["train.global_batch=1000000000"], "train.global_batch must be at most 16777216: a step's windows are listed"),
        (["train.micro_batch=7"], "train.global_batch (512) must be a multiple of train.micro_batch (7)"),
        (["train.min_lr_ratio=1.1"], "train.min_lr_ratio must lie between 0 and 1"),
        (["train.min_lr_ratio=-0.1"], "train.min_lr_ratio must lie between 0 and 1"),
        (["train.beta1=1"], "train.beta1 must be at least 0 and below 1"),
        (["train.beta2=-0.1"], "train.beta2 must be at least 0 and below 1"),
        (["sae.k=9", "sae.n_latents=8"], "sae.k (9) must be at most sae.n_latents (8)"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(write, overrides, message):
    path = write("")
    with pytest.raises(CocomixError) as raised:
        load(path, *overrides)
    assert str(raised.value).startswith(f"{path}: {message}")


def test_the_limits_themselves_are_allowed(write):
    load(
        write(""),
        "data.seq_len=2",
        "data.vocab_size=2147483648",
        "model.concept_dim=65535",
        "model.insert_layer=7",
        "train.min_lr_ratio=1",
        "train.zero_stage=3",
        "train.precision=bf16",
        "sae.k=32768",
        "train.beta1=0",
    )


def test_a_plain_model_needs_no_concept_settings(write):
    load(write(""), "model.mixing=none", "model.insert_layer=99", "model.concept_dim=100000")


# --- extreme values


NUMBERS = ["0", "1", "-1", "2", "1e300", "1e-320", str(10**20), ".nan", ".inf", "-.inf"]


@pytest.mark.parametrize(
    "key",
    [
        f"{section.name}.{setting.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.default_factory)
        for setting in dataclasses.fields(section.default_factory)
        if setting.type is not bool
    ],
)
def test_any_number_is_taken_or_refused_in_one_line(write, key):
    path = write("")
    for number in NUMBERS:
        try:
            load(path, f"{key}={number}")
        except CocomixError as error:
            assert str(error).startswith((str(path), "override")) and "\n" not in str(error)
