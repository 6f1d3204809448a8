"""What an optimizer step depends on, as files: fp32 weights and Adam's moments, by parameter name, in pieces.

However ZeRO cuts the state, each rank holds contiguous pieces of flattened parameters. It writes those, and later
reads those that it holds then, from whichever files have them: the number of ranks and the ZeRO stage may change in
between, no rank ever holds more than its own share and one stored piece, and with nothing changed every bit comes back.

FOLDER/rank-00002-of-00008.safetensors holds tensors NAME/KIND/START (flat, from element START of the parameter NAME;
KIND is master, exp_avg or exp_avg_sq) and this rank's random states; its metadata name the save it belongs to and
hold a checksum of each tensor.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cocomix.core.errors import CocomixError
from cocomix.distributed.ranks import Ranks
from cocomix.distributed.state_file import open_state_file

_MOMENTS = ("exp_avg", "exp_avg_sq")
_RANDOM = "random"  # no parameter's name: those have a dot


@dataclass(frozen=True)
class Piece:
    """Elements `start` and on of a flattened parameter, as this rank holds them."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]  # by kind: flat fp32 views into the optimizer's own tensors, equally long

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.tensors["master"].numel()


def held_pieces(engine) -> Iterator[Piece]:
    """The pieces that this rank's optimizer updates; at stage 0 every rank holds whole parameters."""
    stage = engine.zero_optimization_stage()
    locate = {0: _locate_replicated, 3: _locate_at_stage_3}.get(stage, _locate_at_stage_1_or_2)
    for name, parameter in engine.module.named_parameters():
        found = locate(engine, parameter)
        if found is None:
            continue
        flat, offset, start, length = found
        state = _adam_state(engine.basic_optimizer, flat)
        whole = {"master": flat.detach(), **{kind: state[kind] for kind in _MOMENTS}}
        yield Piece(name, start, {kind: tensor.view(-1)[offset : offset + length] for kind, tensor in whole.items()})


# Each finds (the fp32 tensor that Adam updates, offset in it, start in the parameter, length), None where this rank
# holds nothing of the parameter.


def _locate_replicated(_engine, parameter):
    return parameter, 0, 0, parameter.numel()


def _locate_at_stage_1_or_2(engine, parameter):
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    [flat] = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
    return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel


def _locate_at_stage_3(engine, parameter):
    zero = engine.optimizer
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = length * torch.distributed.get_rank()
    length = min(length, parameter.ds_numel - start)  # the last ranks' pieces are padded
    return (zero.fp32_partitioned_groups_flat[group], offset, start, length) if length > 0 else None


def _adam_state(optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a tensor, made as AdamW itself makes it in its first step where there is none yet."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for kind in _MOMENTS:
            state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format, requires_grad=False)
    return state


def state_to_save(engine, ranks: Ranks) -> dict[str, torch.Tensor]:
    """What this rank's file holds, as views of the living tensors; all ranks must write theirs."""
    tensors = {f"{_RANDOM}/{name}": state for name, state in _random_states(ranks.device).items()}
    for piece in held_pieces(engine):
        if engine.zero_optimization_stage() == 0:
            piece = _share(piece, ranks)
        for kind, tensor in piece.tensors.items():
            if tensor.numel():
                tensors[f"{piece.name}/{kind}/{piece.start}"] = tensor.contiguous()
    return tensors


def _share(piece: Piece, ranks: Ranks) -> Piece:
    """This rank's share of a piece that every rank holds."""
    first, last = (piece.stop * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
    return Piece(piece.name, first, {kind: tensor[first:last] for kind, tensor in piece.tensors.items()})


def state_file_name(rank: int, world: int) -> str:
    """The name of one rank's file in the folder of a state."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def adam_steps(engine) -> int:
    """Steps that Adam has taken."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values() if state), default=0)


def load_pieces(
    engine,
    folder: Path,
    save_id: str,
    saved_world: int,
    steps: int,
    ranks: Ranks,
    new_parameters: Collection[str] = (),
) -> None:
    """Fill in what this rank holds from the files of the `saved_world` ranks that wrote them, and its random states
    where it has a file of its own; Adam has taken `steps` steps. The files need not hold the `new_parameters`, which
    then stay as they are, with moments of zero.

    Call `publish_weights` after all ranks have come through. Raises `CocomixError` for a file that is missing,
    damaged or of another save.
    """
    missing = {
        (piece.name, kind): _Missing(piece.start, tensor)
        for piece in held_pieces(engine)
        for kind, tensor in piece.tensors.items()
        if piece.name not in new_parameters
    }
    first = ranks.rank * saved_world // ranks.world  # where this rank's share most likely begins
    for rank in ((first + i) % saved_world for i in range(saved_world)):
        if not any(gap.left for gap in missing.values()):
            break
        _fill_from(folder / state_file_name(rank, saved_world), save_id, missing)
    incomplete = sorted({name for (name, _), gap in missing.items() if gap.left})
    if incomplete:
        raise CocomixError(f"the files in {folder} lack parts of {', '.join(incomplete[:3])}")
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(steps)
    if ranks.rank < saved_world:
        _restore_random_states(folder / state_file_name(ranks.rank, saved_world), ranks.device)


class _Missing:
    """A flat tensor of which not all elements have been read yet."""

    def __init__(self, start: int, tensor: torch.Tensor):
        self.start, self.tensor, self.left = start, tensor, tensor.numel()

    def overlaps(self, start: int, length: int) -> bool:
        """Whether this has any of the `length` elements from element `start` on."""
        return start < self.start + self.tensor.numel() and self.start < start + length

    def fill(self, start: int, stored: torch.Tensor) -> None:
        """Take what `stored`, from element `start` on, has of this."""
        first = max(start, self.start)
        last = min(start + stored.numel(), self.start + self.tensor.numel())
        self.tensor[first - self.start : last - self.start].copy_(stored[first - start : last - start])
        self.left -= last - first


def read_weights(folder: Path, save_id: str, saved_world: int) -> dict[str, torch.Tensor]:
    """The fp32 weights by parameter name, flat, from the files of all ranks that wrote them, without an engine.

    Raises `CocomixError` for a file that is missing, damaged or of another save.
    """
    pieces = {}
    for rank in range(saved_world):
        with open_state_file(folder / state_file_name(rank, saved_world), save_id) as file:
            for key in file.keys():
                if key.startswith(f"{_RANDOM}/"):
                    continue
                name, kind, start = key.rsplit("/", 2)
                if kind == "master":
                    pieces.setdefault(name, {})[int(start)] = file.tensor(key)
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def _fill_from(path: Path, save_id: str, missing: dict[tuple[str, str], _Missing]) -> None:
    with open_state_file(path, save_id) as file:
        for key in file.keys():
            if key.startswith(f"{_RANDOM}/"):
                continue
            name, kind, start = key.rsplit("/", 2)
            gap = missing.get((name, kind))
            if gap is not None and gap.left and gap.overlaps(int(start), file.length(key)):
                gap.fill(int(start), file.tensor(key))


@torch.no_grad()
def publish_weights(engine) -> None:
    """Bring the weights that the model computes with in line with the fp32 ones; all ranks must call this."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.checkpoint_event_prologue()  # partitions what is gathered at the moment
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # gathers what always is


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_random_states(path: Path, device: torch.device) -> None:
    with open_state_file(path) as file:
        stored = {key.rsplit("/", 1)[1]: file.tensor(key) for key in file.keys() if key.startswith(f"{_RANDOM}/")}
    if "cpu" not in stored:
        raise CocomixError(f"{path} is damaged: it lacks {_RANDOM}/cpu")
    torch.set_rng_state(stored["cpu"])
    if device.type == "cuda" and "cuda" in stored:
        torch.cuda.set_rng_state(stored["cuda"], device)
