import pytest
from command_helpers import call, record_call

from cocomix.costs.profile_session import Options


@pytest.fixture
def profiled(monkeypatch):
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")  # set already, hence left alone and restored
    return record_call(monkeypatch, "cocomix.costs.profiler.run")


def test_without_options_everything_is_measured(world, profiled):
    assert call(world, "profile") == 0
    assert profiled == [(world.load(), Options(), None, None)]


def test_options_are_handed_on(world, profiled):
    sizes = ["--rounds", "2", "--steps", "3", "--accumulation", "4", "--vocab-size", "300"]
    kinds = ["--fit", "--random-teacher", "--no-breakdown"]
    assert call(world, "profile", *sizes, *kinds, "--trace", "traces", "--json", "f.json") == 0
    options = Options(
        rounds=2,
        steps=3,
        accumulation=4,
        fit=True,
        random_teacher=True,
        vocab_size=300,
        breakdown=False,
    )
    assert profiled == [(world.load(), options, "traces", "f.json")]


@pytest.mark.parametrize(
    ("labels", "kinds"), [("cached", ("cached",)), ("online", ("online",)), ("both", ("cached", "online"))]
)
def test_labels_may_be_of_one_kind_or_of_both(world, profiled, labels, kinds):
    assert call(world, "profile", "--labels", labels) == 0
    assert profiled[0][1].labels == kinds


def test_mixing_stands_in_for_the_configs(world, profiled):
    assert call(world, "profile", "--mixing", "add", "model.mixing=predict") == 0
    assert profiled[0][0].model.mixing == "add"


@pytest.mark.parametrize("option", ["--rounds", "--steps", "--accumulation"])
def test_nothing_can_be_measured_no_times(world, profiled, capsys, option):
    with pytest.raises(SystemExit):
        call(world, "profile", option, "0")
    assert f"argument {option}: 0 is not at least 1" in capsys.readouterr().err
    assert not profiled
