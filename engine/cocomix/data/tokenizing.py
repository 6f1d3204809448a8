"""Pieces of text -> token ids, on all cores."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.data.documents import Piece
from cocomix.data.tokenizer import token_dtype, vocab_size_of

_BATCH_CHARS = 1 << 21
_THREADS_AHEAD = 2  # batches in the tokenizer at a time, so that its own threads have work while one of them ends


def tokenize(stream: Iterable[Piece], tokenizer, processes: int = 1) -> Iterator[tuple[Piece, np.ndarray]]:
    """Token ids of every piece, in order, as token files hold them; with the end-of-text token where a document ends.

    Pieces of one document are encoded apart. They end where GPT-2 style tokenizers split anyway; a tokenizer that
    puts a space before every text puts one before every piece. One process uses all cores through the tokenizer's own
    threads; more share the cores, which is faster where there are many. Raises `CocomixError` where one of them dies.
    """
    ahead: deque[tuple[list[Piece], Future]] = deque()
    dtype = token_dtype(vocab_size_of(tokenizer))
    try:
        with _workers(tokenizer, processes) as workers:
            for batch in _batches(stream):
                ahead.append((batch, workers.submit(_encode, [piece.text for piece in batch], dtype)))
                if len(ahead) > max(_THREADS_AHEAD, processes + 1):
                    yield from _finished(*ahead.popleft(), tokenizer.eos_token_id)
            while ahead:
                yield from _finished(*ahead.popleft(), tokenizer.eos_token_id)
    except BrokenProcessPool:
        raise CocomixError(
            f"one of the {processes} processes that tokenize has died, perhaps for want of memory: lower data.processes"
        ) from None


def _finished(batch: list[Piece], encoded: Future, eot_id: int) -> Iterator[tuple[Piece, np.ndarray]]:
    for piece, ids in zip(batch, encoded.result(), strict=True):
        yield piece, np.append(ids, ids.dtype.type(eot_id)) if piece.last else ids


_worker = threading.local()  # a thread's, or a process's, own encoder


def _workers(tokenizer, processes: int) -> Executor:
    serialized = tokenizer.backend_tokenizer.to_str()
    if processes == 1:  # the tokenizer lets go of the interpreter while it works
        return ThreadPoolExecutor(_THREADS_AHEAD, initializer=_start_worker, initargs=(serialized,))
    return ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(serialized, max(1, len(os.sched_getaffinity(0)) // processes)),
    )


def _start_process(serialized: str, threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start_worker(serialized)


def _end_with_parent() -> None:
    """End this process when the one that started it has ended: killed, it ends nobody, and a worker waits for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _start_worker(serialized: str) -> None:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(serialized)
    encoder.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    encoder.no_truncation()
    encoder.no_padding()
    _worker.encoder = encoder


def _encode(texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
    encodings = _worker.encoder.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, chars = [], 0
    for piece in stream:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
