"""`cocomix labels`: what a frozen teacher says about every token, computed once and kept."""

from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.methods import LABELS, SOFT_TARGETS
from cocomix.data.token_files import TokenFiles
from cocomix.distributed.ranks import own_device, rank_and_world
from cocomix.teacher.concept_teacher import ConceptTeacher
from cocomix.teacher.distillation import SoftTargetCache
from cocomix.teacher.label_cache import NONE, LabelCache
from cocomix.teacher.shard_cache import ShardCache
from cocomix.teacher.supervision import data_fingerprints, distillation_teacher, require_vocabulary


def run(config: Config) -> None:
    """`cocomix labels`: fill the caches that the config names, of concept labels and of soft targets for distillation,
    together with the other ranks, which need no more than a common folder.

    Each rank verifies and completes every `world`-th shard, then makes what others have left over: a rank that died or
    never started. Run again, it goes on where it stopped, and makes damaged shards anew. Raises `CocomixError` where
    teacher, SAE, token files or cache do not fit.
    """
    wanted = config.learns_from or (LABELS,)  # labels depend on no student: others may learn from them
    wants_labels, wants_soft_targets = (name in wanted and config.cache_of(name) for name in (LABELS, SOFT_TARGETS))
    if not wants_labels and not wants_soft_targets:
        setting = "concept_labels.cache" if LABELS in wanted else "distillation.cache"
        raise CocomixError(f"{setting} is not set: name the folder that the {' and '.join(wanted)} should go to")
    if not config.learns_from and rank_and_world()[0] == 0:
        print(f"note: model.mixing={config.model.mixing} learns from no labels; these are for other students")
    device, tokens = own_device(), TokenFiles.open(config.data.folder)
    teacher = None
    if wants_labels:
        teacher, cache = _labels(config, tokens, device)
        _fill(cache, tokens, lambda ids: teacher.labels(ids).cpu(), device)
    if wants_soft_targets:
        soft_teacher, cache = _soft_targets(config, tokens, device, teacher)
        _fill(cache, tokens, soft_teacher.targets, device)


def _labels(config, tokens, device):
    teacher = ConceptTeacher.from_config(config.teacher, device)
    require_vocabulary(teacher.model, tokens)
    if teacher.sae.n_latents > NONE:
        raise CocomixError(
            f"teacher.sae has {teacher.sae.n_latents} latents, but a label cache numbers at most {NONE}: take an SAE "
            "with fewer"
        )
    return teacher, LabelCache.create(
        config.concept_labels.cache, label_topk=config.teacher.label_topk, **_shape(config, tokens, teacher)
    )


def _soft_targets(config, tokens, device, other):
    teacher = distillation_teacher(config, tokens, device, other)
    return teacher, SoftTargetCache.create(
        config.distillation.cache, top_k=config.distillation.top_k, **_shape(config, tokens, teacher)
    )


def _shape(config, tokens, teacher):
    return {
        "n_windows": tokens.split("train").n_windows(config.data.seq_len),
        "seq_len": config.data.seq_len,
        "fingerprints": data_fingerprints(config, tokens) | teacher.fingerprints(),
        "shard_windows": config.concept_labels.shard_windows,
    }


def _fill(cache: ShardCache, tokens: TokenFiles, make: Callable, device: torch.device) -> None:
    """Write all shards that are missing, of what `make` says of windows [n, T] on the device."""
    rank, world = rank_and_world()
    split = tokens.split("train")
    cache.remove_abandoned()
    n_made = 0
    with _progress(cache, rank, world) as bar:
        for shard in _shards_to_make(cache, rank, world, bar):
            with cache.writer(shard) as write:
                for part in _batches(cache.windows_of(shard)):
                    write(make(torch.from_numpy(split.windows(part, cache.seq_len)).to(device)))
                    bar.update(len(part) * cache.seq_len)
            n_made += 1
    _report(cache, rank, n_made)


def _progress(cache, rank, world):
    n_windows = sum(len(cache.windows_of(shard)) for shard in range(rank, cache.n_shards, world))
    return tqdm(total=n_windows * cache.seq_len, desc=cache.stem, unit="tok", unit_scale=True, disable=rank > 0)


def _shards_to_make(cache: ShardCache, rank: int, world: int, bar) -> Iterator[int]:
    """The missing and damaged ones of this rank's share, then what nobody else is at."""
    # By number, not by position among the missing ones: other ranks may have finished some before this one looks.
    for shard in range(rank, cache.n_shards, world):
        try:
            damage = cache.damage(shard)
        except FileNotFoundError:
            yield shard
            continue
        if damage:
            bar.write(f"{cache.stem}: shard {shard} of {cache.folder} {damage}: it is made anew")
            yield shard
        else:
            bar.update(len(cache.windows_of(shard)) * cache.seq_len)
    start = rank * cache.n_shards // world  # so that ranks that are done at the same time take different ones
    while (shard := cache.unclaimed(start)) is not None:
        bar.total += len(cache.windows_of(shard)) * cache.seq_len
        yield shard


def _batches(windows: range, size: int = 32) -> Iterator[range]:
    for start in range(windows.start, windows.stop, size):
        yield range(start, min(start + size, windows.stop))


def _report(cache, rank, n_made) -> None:
    missing = cache.n_missing()
    if missing == 0 and (rank == 0 or n_made):
        print(f"{cache.stem}: {cache.folder} is complete: {cache.n_windows:,} windows of {cache.seq_len} tokens")
    elif rank == 0:
        print(
            f"{cache.stem}: {cache.folder} still lacks {missing} of {cache.n_shards} shards: other processes are at "
            "work on them; if they have died, run this again"
        )
