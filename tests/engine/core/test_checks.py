from dataclasses import dataclass

import pytest

from cocomix.core.checks import checked, not_negative, one_of, positive, problems


@dataclass
class Settings:
    free: int = -3
    width: int = positive(8)
    ids: int = positive(8, at_most=10, because="there are ten")
    share: float = checked(0.5, lambda share: 0 < share < 1, "must lie between 0 and 1")
    decay: float = not_negative(0.0)
    dtype: str = one_of("fp32", ("fp32", "bf16"))
    backend: str | None = one_of(None, (None, "torch", "triton", "flash"))
    stage: int = one_of(1, (0, 1, 2), "0, 1 or 2")


def test_the_defaults_are_those_of_a_plain_dataclass_and_allowed():
    assert Settings() == Settings(-3, 8, 8, 0.5, 0.0, "fp32", None, 1)
    assert list(problems(Settings())) == []


@pytest.mark.parametrize(
    "setting, problem",
    [
        ({"width": 0}, "width must be positive"),
        ({"width": float("inf")}, "width must be a finite number"),
        ({"ids": -1}, "ids must be positive"),
        ({"ids": 11}, "ids must be at most 10: there are ten"),
        ({"share": 1.0}, "share must lie between 0 and 1"),
        ({"share": float("nan")}, "share must lie between 0 and 1"),
        ({"decay": -0.1}, "decay must not be negative"),
        ({"decay": float("nan")}, "decay must be a finite number"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; it must be fp32 or bf16"),
        ({"backend": "flex"}, "backend is 'flex'; it must be null or one of torch, triton, flash"),
        ({"stage": 3}, "stage is 3; it must be 0, 1 or 2"),
    ],
)
def test_what_is_not_allowed_is_named(setting, problem):
    assert list(problems(Settings(**setting))) == [problem]


def test_every_problem_is_named_in_the_order_of_the_settings():
    assert list(problems(Settings(decay=-1, width=0))) == ["width must be positive", "decay must not be negative"]
