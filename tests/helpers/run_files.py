"""Run folders as training leaves them, with losses that tests know."""

import json

import numpy as np

TOKENS_PER_STEP = 4096


def write_run(
    folder, mode="none", steps=200, *, eval_every=50, finished=True, offset=0.0, step_time=0.5, distilled=False, **info
):
    """A run folder with losses that fall towards 4.0 + offset."""
    folder.mkdir(parents=True)
    labels = None if mode == "none" else "cached"
    data = {"vocab_size": 4096, "train_tokens": 2_500_000, "val_tokens": 130_000, "val_unigram_perplexity": 612.3}
    config = {
        "data": {"folder": "data", "text": ["stdlib"]},
        "model": {"mixing": mode, "n_embd": 128},
        "train": {"run": str(folder), "lr": 6e-4, "eval_windows": 0},
    }
    content = {
        "name": folder.name,
        "method": mode,
        "concept_labels": labels,
        "soft_targets": "cached" if distilled else None,
        "device": "NVIDIA H100 80GB HBM3",
        "world_size": 1,
        "parameters": 25_230_000,
        "tokens_per_step": TOKENS_PER_STEP,
        "total_steps": steps,
        "seq_len": 256,
        "flops_per_token": 150_000_000 if mode == "none" else 300_000_000,
        "versions": {"torch": "2.13.0", "deepspeed": "0.18.2", "cocomix": "0.1.0"},
        "config": config,
        "data": data,
    }
    (folder / "run.json").write_text(json.dumps(content | info))
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n" for line in metrics(mode, steps, eval_every, finished, offset, step_time, distilled)
        )
    )
    return folder


def metrics(mode, steps, eval_every, finished, offset, step_time, distilled=False):
    noise = np.random.default_rng(0)
    lines = []

    def at(kind, step, **values):
        return {"kind": kind, "step": step, "tokens": step * TOKENS_PER_STEP, "elapsed_s": step * step_time} | values

    def loss(step):
        return 4.0 + offset + 5.0 / (1 + step / 20)

    for step in range(10, steps + 1, 10):
        ntp_loss = loss(step) + 0.1 * float(noise.standard_normal())
        concept_loss = None if mode == "none" else 6.0 + 4.0 / (1 + step / 30)
        slow = 20 if step == 10 else 1
        lines.append(
            at(
                "train",
                step,
                loss=ntp_loss + 0.1 * (concept_loss or 0),
                ntp_loss=ntp_loss,
                lr=6e-4,
                concept_loss=concept_loss,
                **({"distillation_loss": 2 / step} if distilled else {}),
                grad_norm=1.0,
                step_time_s=step_time * slow,
                tokens_per_s=TOKENS_PER_STEP / step_time / slow,
                peak_memory_gib=1.25,
            )
        )
        if step % eval_every == 0:
            concepts = (
                {}
                if mode == "none"
                else {
                    "concept_tokens": 2048,
                    "label_coverage": 0.875,
                    "concept_agreement": 1 - 1 / (1 + step / 100),
                    "label_concepts": 811,
                    "predicted_concepts": 402,
                }
            )
            lines.append(at("eval", step, loss=loss(step), perplexity=float(np.exp(loss(step))), **concepts))
    if finished:
        lines.append(
            at(
                "summary",
                steps,
                loss=loss(steps),
                perplexity=float(np.exp(loss(steps))),
                tokens_per_s=TOKENS_PER_STEP / step_time,
                step_time_s=step_time,
                peak_memory_gib=1.25,
                step_time_p10_s=step_time * 0.98,
                step_time_p90_s=step_time * 1.07,
            )
        )
    return lines
