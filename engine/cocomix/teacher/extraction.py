"""`cocomix labels`: what a frozen teacher says about every token, computed once and kept."""

import functools
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.precision import TEACHER, settled
from cocomix.data.token_files import TokenFiles
from cocomix.distributed.ranks import own_device, rank_and_world
from cocomix.teacher.concept_labels import ConceptLabels
from cocomix.teacher.shard_cache import ShardCache
from cocomix.teacher.supervision import cached_precision, wanted_kinds
from cocomix.teacher.supervision_kind import SupervisionKind

# Labels depend on no student: others may learn from them.
_WITHOUT_A_STUDENT: tuple[SupervisionKind, ...] = (ConceptLabels(),)


def run(config: Config) -> None:
    """`cocomix labels`: fill the caches that the config names, of all that its student learns from, together with the
    other ranks, which need no more than a common folder.

    Each rank verifies and completes every `world`-th shard, then makes what others have left over: a rank that died or
    never started. Run again, it continues where it stopped, and makes damaged shards anew. Raises `CocomixError` where
    teacher, SAE, token files or cache do not fit.
    """
    wanted = wanted_kinds(config) or _WITHOUT_A_STUDENT
    cached = [kind for kind in wanted if kind.cache_folder(config)]
    if not cached:
        names = " and ".join(kind.name for kind in wanted)
        raise CocomixError(f"{wanted[0].cache_class.setting} is not set: name the folder that the {names} should go to")
    if not wanted_kinds(config) and rank_and_world()[0] == 0:
        print(f"note: model.mixing={config.model.mixing} learns from no labels; these are for other students")
    device, tokens, model = own_device(), TokenFiles.open(config.data.folder), None
    config, notes = settled(config, device.type, lambda unsettled: cached_precision(unsettled, cached))
    if TEACHER in notes and rank_and_world()[0] == 0:
        print(notes[TEACHER])
    for kind in cached:
        teacher = kind.make_teacher(config, tokens, device, model)
        model = teacher.model  # all teachers share one
        cache = kind.start_cache(config, tokens, teacher)
        _fill(cache, tokens, functools.partial(kind.cache_values, teacher), device)


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
