"""What `auto` stands for in train.precision and teacher.dtype: bf16 where the machine multiplies it in hardware."""

import dataclasses
from collections.abc import Callable, Mapping

from cocomix.core.config import AUTO, Config

STUDENT, TEACHER = "train.precision", "teacher.dtype"  # the settings that may be `auto`
_CPU_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}  # which have products of bf16, the fastest first


def fastest(device_type: str) -> tuple[str, str]:
    """The precision that a machine's products run faster in ("bf16" or "fp32"), and why; `device_type` as PyTorch names
    it."""
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


def settled(
    config: Config, device_type: str, begun_with: Callable[[Config], Mapping[str, str]] = lambda _: {}
) -> tuple[Config, dict[str, str]]:
    """The config without `auto`, and by the name of each setting that was `auto` a line that says what it became.

    `begun_with` says, by the same names, what the run, cache or SAE that is continued began with; that comes first. It
    is asked only where something is `auto`. Stage 0 of ZeRO computes in fp32 alone.
    """
    sections = {"train": config.train, "teacher": config.teacher}
    wanted = [name for name in (STUDENT, TEACHER) if _value(sections, name) == AUTO]
    begun: Mapping[str, str] = begun_with(config) if wanted else {}
    notes: dict[str, str] = {}
    for name in wanted:
        if name in begun:
            value, why = begun[name], "what is continued began with it"
        elif name == STUDENT and config.train.zero_stage == 0:
            value, why = "fp32", "stage 0 of ZeRO computes in nothing else"
        else:
            value, why = fastest(device_type)
        section, key = name.split(".")
        sections[section] = dataclasses.replace(sections[section], **{key: value})
        notes[name] = f"{name}=auto: {value}, since {why}"
    return dataclasses.replace(config, **sections), notes


def _value(sections: Mapping[str, object], name: str) -> object:
    section, key = name.split(".")
    return getattr(sections[section], key)
