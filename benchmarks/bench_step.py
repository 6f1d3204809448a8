"""What a training step costs: plain next-token prediction against CoCoMix, cached and online labels.

    python benchmarks/bench_step.py [--threads 4] [--tokens 1024] [--rounds 9] [--json FILE]

One forward and backward pass of the paper's 69M student over one window, in float32 on the CPU (bfloat16 on a GPU),
without the optimizer. Rounds alternate between the modes, so a machine that drifts hits all of them; times are
medians with the 10th and 90th percentile, ratios are medians of the per-round ratios. Peak memory is taken in a
process of its own for each mode: the tensors that are alive at once, and what the system counts for the whole process
(which holds libraries too, and what the allocator keeps).
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import torch
from machine import free_cores

from cocomix import CoCoMixConfig, CoCoMixForCausalLM, ConceptTeacher, SparseAutoencoder
from cocomix.files import write_json
from cocomix.flops import StudentShape, TeacherShape, ideal_ratio
from cocomix.machine import describe, peak_bytes
from cocomix.metrics import peak_memory_gib

STUDENT = StudentShape(n_embd=512, n_layer=8, insert_layer=3, vocab_size=50257, seq_len=1024, concept_dim=32768,
                       concept_topk=32)
TEACHER = TeacherShape(n_embd=768, n_layer=12, layer=5, vocab_size=50257, n_latents=32768)  # GPT-2 124M
LABEL_TOPK = 4
MODES = ("ntp", "cached", "online")
TARGET = {"cached": 1.8, "online": 3.5, "memory": 1.6}


def build_student(mixing: str, seq_len: int, device) -> CoCoMixForCausalLM:
    """The 69M student with fresh weights."""
    torch.manual_seed(0)
    shape = {**dataclasses.asdict(STUDENT), "n_positions": seq_len, "mixing": mixing}
    del shape["seq_len"]
    model = CoCoMixForCausalLM(CoCoMixConfig(**shape, n_head=8))
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).train()


def build_teacher(seq_len: int, device) -> ConceptTeacher:
    """A GPT-2-124M-shaped teacher and its SAE, with random weights: the arithmetic does not depend on them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_positions=seq_len))
    weights = [torch.randn(TEACHER.n_latents, TEACHER.n_embd) * TEACHER.n_embd**-0.5 for _ in range(2)]
    sae = SparseAutoencoder(weights[0], torch.zeros(TEACHER.n_latents), torch.zeros(TEACHER.n_embd), weights[1], k=32,
                            normalize=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return ConceptTeacher(model.to(device, dtype), sae.to(device, dtype), TEACHER.layer, LABEL_TOPK)


class Step:
    """One mode's forward and backward pass."""

    def __init__(self, mode: str, seq_len: int, device):
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(STUDENT.vocab_size, (1, seq_len), generator=generator).to(device)
        self.labels = torch.randint(STUDENT.concept_dim, (1, seq_len, LABEL_TOPK), generator=generator).to(device)
        self.model = build_student("none" if mode == "ntp" else "interleave", seq_len, device)
        self.teacher = build_teacher(seq_len, device) if mode == "online" else None
        self.mode = mode

    def __call__(self) -> None:
        """Gradients of one window into fresh buffers, as in training."""
        labels = None if self.mode == "ntp" else self.labels
        if self.teacher is not None:
            labels = self.teacher.labels(self.ids)
        self.model(self.ids, labels=self.ids, concept_labels=labels).loss.backward()
        self.model.zero_grad(set_to_none=True)


def seconds(step: Step, device) -> float:
    """Wall-clock seconds of one step."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_times(seq_len: int, rounds: int, device) -> dict[str, np.ndarray]:
    """Seconds of each mode in each round, after two rounds of warm-up."""
    steps = {mode: Step(mode, seq_len, device) for mode in MODES}
    times = {mode: [] for mode in MODES}
    for _ in range(rounds + 2):
        for mode, step in steps.items():
            times[mode].append(seconds(step, device))
    return {mode: np.array(values[2:]) for mode, values in times.items()}


def measure_memory(mode: str, seq_len: int, device) -> dict[str, float]:
    """Peak memory of the second step, GiB: tensors alive (weights included), and on a CPU the whole process."""
    step = Step(mode, seq_len, device)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return {"tensors_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    above, _ = peak_bytes(step, device)
    modules = [step.model] if step.teacher is None else [step.model, step.teacher.model, step.teacher.sae]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    return {"tensors_gib": (weights + above) / 2**30, "process_gib": peak_memory_gib(device)}


def memory_in_own_process(mode: str, options) -> dict[str, float]:
    """`measure_memory` in a fresh interpreter."""
    command = [sys.executable, __file__, "--memory-of", mode, "--tokens", str(options.tokens),
               "--threads", str(options.threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.splitlines()[-1])


def summarise(times, memory, seq_len) -> dict:
    """Everything the table shows, as one JSON object."""
    shape = dataclasses.replace(STUDENT, seq_len=seq_len)
    ideal = {"ntp": 1.0, "cached": ideal_ratio(shape), "online": ideal_ratio(shape, TEACHER)}
    rows = {}
    for mode in MODES:
        ratio = float(np.median(times[mode] / times["ntp"]))
        low, median, high = np.percentile(times[mode], [10, 50, 90])
        rows[mode] = {
            "step_ms": median * 1e3, "step_p10_ms": low * 1e3, "step_p90_ms": high * 1e3, "ratio": ratio,
            "ideal_ratio": ideal[mode], "efficiency": ideal[mode] / ratio,
            **memory[mode], **{f"{key.removesuffix('_gib')}_ratio": value / memory["ntp"][key]
                               for key, value in memory[mode].items()},
        }
    return rows


def print_table(rows) -> None:
    """The figures and whether they meet the project's targets."""
    columns = {"step ms": "step_ms", "p10": "step_p10_ms", "p90": "step_p90_ms", "ratio": "ratio",
               "ideal": "ideal_ratio", "efficiency": "efficiency", "tensors GiB": "tensors_gib",
               "ratio ": "tensors_ratio", "process GiB": "process_gib", "ratio  ": "process_ratio"}
    columns = {title: key for title, key in columns.items() if key in rows["ntp"]}
    print(f"{'mode':8}" + "".join(f"{title.strip():>{max(len(title) + 2, 8)}}" for title in columns))
    for mode, row in rows.items():
        cells = [f"{row[key]:{max(len(title) + 2, 8)}.{0 if key.endswith('_ms') else 2}f}"
                 for title, key in columns.items()]
        print(f"{mode:8}" + "".join(cells))
    for name, value in (("cached", rows["cached"]["ratio"]), ("online", rows["online"]["ratio"]),
                        ("memory", rows["cached"]["tensors_ratio"])):
        print(f"{name} ratio {value:.2f}: target {TARGET[name]} {'met' if value <= TARGET[name] else 'NOT met'}")


def main() -> None:
    """Measure, print, and keep the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=free_cores(), help="cores that are free, at most 4")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in the window")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--memory-of", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, options.tokens, device)))
        return
    memory = {mode: memory_in_own_process(mode, options) for mode in MODES}
    rows = summarise(measure_times(options.tokens, options.rounds, device), memory, options.tokens)
    print(json.dumps(describe(device)))
    print_table(rows)
    if options.json:
        write_json(options.json, {"benchmark": "step", "machine": describe(device), "tokens": options.tokens,
                                  "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
