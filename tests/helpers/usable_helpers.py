"""A run folder with a model, its tokenizer, and the config of its teacher, as training leaves it but untrained."""

import dataclasses
import json
from pathlib import Path

import torch
from run_helpers import LATENTS, SEQ_LEN, World

from cocomix.core.manifest import write_manifest
from cocomix.data.token_files import TokenFiles
from cocomix.model.config import CoCoMixConfig
from cocomix.model.model import CoCoMixForCausalLM


def make_run(world: World, name: str = "run", mixing: str = "interleave", **settings) -> Path:
    """Save a random model with large weights below the world's folder; the folder of its run."""
    tokens = TokenFiles.open(world.folder / "data")
    torch.manual_seed(7)
    model = CoCoMixForCausalLM(
        CoCoMixConfig(
            **{
                "n_embd": 32,
                "n_layer": 3,
                "n_head": 2,
                "vocab_size": tokens.vocab_size,
                "n_positions": SEQ_LEN,
                "concept_dim": LATENTS,
                "concept_topk": 4,
                "insert_layer": 1,
                "mixing": mixing,
                "eos_token_id": tokens.eot_id,
                "initializer_range": 0.3,
                **settings,
            }
        )
    )
    torch.nn.init.normal_(model.transformer.ln_f.weight, mean=1.0, std=0.5)
    folder = world.folder / name
    model.save_pretrained(folder / "model")
    tokens.tokenizer().save_pretrained(folder / "model")
    write_manifest(folder / "model")
    config = world.load()
    (folder / "run.json").write_text(
        json.dumps(
            {
                "config": {
                    "data": {"folder": config.data.folder, "seed": 0},
                    "teacher": dataclasses.asdict(config.teacher),
                }
            }
        )
    )
    return folder


def world_of_runs(folder: Path) -> World:
    """A world with a teacher, the run of a mixing student, `run`, and of one without concepts, `plain`."""
    world = World(folder)
    world.add_teacher()
    make_run(world)
    make_run(world, "plain", "none")
    return world


def error_of(capsys, command: str) -> str:
    """The message on standard error: one line, without a traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "|" not in line]  # |: bars
    assert len(lines) == 1 and lines[0].startswith(f"cocomix {command}: error: "), lines
    return lines[0]
