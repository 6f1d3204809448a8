import pytest
from command_helpers import assert_refused, call, record_call


def test_it_trains_the_sae_of_the_config(world, monkeypatch):
    calls = record_call(monkeypatch, "cocomix.teacher.sae_training.run", result={"explained_variance": 0.5})
    assert call(world, "sae", "sae.k=3") == 0
    assert calls == [(world.load("sae.k=3"),)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.sae=OUT/new-sae", "sae.k=65"], "sae.k (65) must be at most sae.n_latents (64)"),
        (["teacher.sae=OUT/text"], "was not written by `cocomix sae`"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(world, capsys, overrides, message):
    assert_refused(world, capsys, "sae", overrides, message)
