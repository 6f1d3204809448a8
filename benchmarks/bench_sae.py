"""What a step of SAE training costs, against the three bare products that a dense one cannot do without.

    python benchmarks/bench_sae.py [--threads 4] [--tokens 4096] [--rounds 9] [--json FILE]

An optimizer step of `cocomix sae` (normalisation, TopK encoder, decoder, AuxK, backward, clipping, Adam, unit decoder
rows) at GPT-2's width and the paper's 32768 latents, on activations that are there already. The three products are
those of a dense step over N tokens: the encoder's, and the gradients of encoder and decoder; each N*C*d, a single
library call. "no dead latents" is what a healthy training does nearly always; "a tenth dead" adds AuxK over 3276
latents, which the three products do not count. Rounds alternate, times are medians with the 10th and 90th percentile,
ratios are medians of the per-round ratios.
"""

import argparse
import statistics

import numpy as np
import torch
from machine import Clock, free_cores

from cocomix.core.config import SaeConfig
from cocomix.core.files import write_json
from cocomix.core.machine import describe
from cocomix.teacher.sae_training import new_state, train_step

WIDTH, LATENTS, K = 768, 32768, 32
DEAD = {"no dead latents": 0, "a tenth dead": LATENTS // 10}
TARGET = 1.3


def main(arguments=None) -> dict:
    """Measure, print a table, and return the figures."""
    options = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads or free_cores())
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.width, device=device)
    ways = {"three products": three_products(x, options.latents)}
    ways |= {
        name: training_step(x, options.latents, round(share * options.latents / LATENTS))
        for name, share in DEAD.items()
    }
    times = _rounds(ways, options.rounds, Clock(device))
    ratios = {name: statistics.median(np.divide(times[name], times["three products"])) for name in DEAD}
    print(f"{'':16} {'ms':>8} {'p10':>8} {'p90':>8} {'ratio':>6}   (target {TARGET})")
    for name, seconds in times.items():
        low, middle, high = 1e3 * np.percentile(seconds, (10, 50, 90))
        print(f"{name:16} {middle:8.0f} {low:8.0f} {high:8.0f} {ratios.get(name, 1.0):6.2f}")
    figures = {
        "machine": describe(device),
        "threads": torch.get_num_threads(),
        "tokens": options.tokens,
        "width": options.width,
        "latents": options.latents,
        "k": K,
        "seconds": times,
        "ratios": ratios,
    }
    if options.json:
        write_json(options.json, figures)
    return figures


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: the cores that are free, at most 4")
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch (default: 4096)")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--latents", type=int, default=LATENTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(arguments)


def three_products(x, latents: int):
    """x [N, d] times the encoder [C, d], and two products of [N, C] with [N, d]."""
    weight, wide = (torch.randn(latents, x.shape[1], device=x.device), torch.randn(len(x), latents, device=x.device))
    out, gradient = torch.empty_like(wide), torch.empty_like(weight)

    def step():
        torch.mm(x, weight.t(), out=out)
        torch.mm(wide.t(), x, out=gradient)
        torch.mm(wide.t(), x, out=gradient)

    return step


def training_step(x, latents: int, n_dead: int):
    """A step of `cocomix sae` on x [N, d], always with `n_dead` dead latents."""
    config = SaeConfig(n_latents=latents, k=K, batch_tokens=len(x), tokens=10**12)
    state = new_state(x.shape[1], config, x.device)

    def step():
        state.silent_tokens.zero_()[:n_dead] = config.dead_after_tokens
        train_step(state, x, config)

    return step


def _rounds(ways: dict, rounds: int, clock) -> dict[str, list[float]]:
    for step in ways.values():
        step()
    times = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            times[name].append(clock.seconds(ways[name]))
    return times


if __name__ == "__main__":
    main()
