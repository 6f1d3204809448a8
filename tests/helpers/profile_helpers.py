"""A profile with figures that tests know."""

from cocomix.core.shapes import StudentShape
from cocomix.costs.profile_results import MethodResults, Parameters, ProfileResults, Settings, Spread

PARTS = {"teacher and labels": 0.0, "h blocks": 0.02, "h blocks, backward": 0.04, "optimizer": 0.04}


def method_results(title, step, ratio=None, parts=PARTS):
    return MethodResults(
        title=title,
        of=None,
        windows=8,
        step_s=Spread.of([step]),
        update_s=Spread.of([step / 10]),
        tokens_per_s=100 / step,
        peak_memory_gib=0.5 * (ratio or 1),
        flops_per_token=1e9,
        mfu=0.42,
        ratio=ratio and Spread.of([ratio]),
        ideal_ratio=ratio and 1.5,
        efficiency=ratio and 1.5 / ratio,
        break_even_saving=ratio and 1 - 1 / ratio,
        slower=None,
        parts=parts,
        parts_s=sum(parts.values()),
        parts_over_step=Spread.of([1.0]),
    )


SETTINGS = Settings(
    precision="fp32",
    zero_stage=1,
    micro_batch=8,
    compile=False,
    activation_checkpointing=False,
    attention_backend=None,
    accumulation=1,
    training_accumulation=1,
    ranks=1,
    seq_len=16,
    mixing="interleave",
    method="CoCoMix",
    learns_from=["labels"],
    tokens="random",
    teacher=None,
    rounds=3,
    steps=1,
)


def profile_results(tokens_per_s=1000.0, product_flops_per_s=1e9):
    """NTP at so many tokens/s and CoCoMix, which takes 1.6 times as long."""
    step = 100 / tokens_per_s
    return ProfileResults(
        machine={"device": "a chip", "commit": "abc"},
        settings=SETTINGS,
        student=StudentShape(8, 2, 1, 512, 16, 32, 4),
        teacher=None,
        parameters=Parameters(ntp=1000, cocomix=2000),
        product_flops_per_s=Spread.of([product_flops_per_s]),
        paper_saving=0.215,
        methods={
            "ntp": method_results("NTP", step),
            "cached": method_results("CoCoMix, cached labels", 1.6 * step, 1.6),
        },
    )
