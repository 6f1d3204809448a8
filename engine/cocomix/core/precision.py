"""What `auto` stands for in train.precision and teacher.dtype: bf16 where the machine multiplies it in hardware."""

import dataclasses
from collections.abc import Mapping

from cocomix.core.config import AUTO, Config

SETTINGS = ("train.precision", "teacher.dtype")
_CPU_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}  # which have products of bf16, the fastest first


def fastest(device_type: str) -> tuple[str, str]:
    """ "bf16" or "fp32", whichever a machine's products run faster in, and why; `device_type` as PyTorch names it."""
    import torch  # not before it is wanted: plans do without

    if device_type != "cpu":
        return "bf16", "a GPU multiplies it in hardware"
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    else:  # an older PyTorch says it in functions of its own
        questions = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
        capabilities = {unit: getattr(torch.cpu, question)() for unit, question in questions.items()}
    units = [name for key, name in _CPU_UNITS.items() if capabilities.get(key)]
    if units:
        return "bf16", f"this processor multiplies it in hardware ({units[0]})"
    return "fp32", "this processor does not multiply bf16 in hardware"


def settled(config: Config, device_type: str, begun_with: Mapping[str, str]) -> tuple[Config, dict[str, str]]:
    """The config without `auto`, and by the name of each setting that was `auto` a line that says what it became.

    `begun_with` has, by the same names, what the run, cache or SAE that is continued began with; that comes first.
    Stage 0 of ZeRO computes in fp32 alone.
    """
    notes: dict[str, str] = {}
    for name in SETTINGS:
        section_name, key = name.split(".")
        section = getattr(config, section_name)
        if getattr(section, key) != AUTO:
            continue
        if name in begun_with:
            value, why = begun_with[name], "what is continued began with it"
        elif name == "train.precision" and config.train.zero_stage == 0:
            value, why = "fp32", "stage 0 of ZeRO computes in nothing else"
        else:
            value, why = fastest(device_type)
        config = dataclasses.replace(config, **{section_name: dataclasses.replace(section, **{key: value})})
        notes[name] = f"{name}=auto: {value}, since {why}"
    return config, notes


def say_precision(notes: Mapping[str, str], has_teacher: bool, trains: bool = True) -> None:
    """Print what `settled` decided, for those of student and teacher that compute here."""
    for name, computes in zip(SETTINGS, (trains, has_teacher), strict=True):
        if computes and name in notes:
            print(notes[name])
