"""Where a training step's time goes: marks at the borders between its parts, in its forward and its backward pass.

A mark is a reading of the clock on a CPU and an event on the stream on a GPU, recorded without waiting for anything.
Between two marks all time belongs to one part, so the parts add up to the step by construction. Marks sit in hooks of
modules, and for the backward pass in hooks of the tensors at the borders: autograd runs the nodes in the reverse of the
order in which the forward pass made them, so the gradient of a part's output is complete just before that part's own
backward pass begins. Nothing inside a module is touched, so compiled and recomputed blocks are measured as they run.

On a GPU training makes labels beside the step on a stream of their own. Under marks they take their turn, or their time
would hide in that of the parts that they slow down; what running beside saves is missing from the parts' sum.
"""

import contextlib
import functools
import time

import torch

from cocomix.core.methods import predicts_concepts

LABELS, EMBEDDINGS, H_BLOCKS, CONCEPT_HEAD = "teacher and labels", "embeddings", "h blocks", "concept head"
MIXING, F_BLOCKS, LM_HEAD = "mixing", "f blocks", "LM head and loss"
OPTIMIZER, COMMUNICATION, OTHER = "optimizer", "communication", "other"
BACKWARD = ", backward"
TRAINED_PARTS = (EMBEDDINGS, H_BLOCKS, CONCEPT_HEAD, MIXING, F_BLOCKS, LM_HEAD)
PARTS = (
    LABELS,
    *TRAINED_PARTS,
    *(part + BACKWARD for part in reversed(TRAINED_PARTS)),
    OPTIMIZER,
    COMMUNICATION,
    OTHER,
)
# What DeepSpeed and `Ranks` call, on torch.distributed and on DeepSpeed's backend that keeps some of it.
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_fn",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "broadcast",
    "broadcast_object_list",
    "barrier",
)


class Timeline:
    """Marks of the steps between `start` and `finish`. `named`: a profiler's trace shows the parts as ranges, too."""

    def __init__(self, device: torch.device, named: bool = False):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks, self._current, self._named, self._range = [], OTHER, named, None

    def enter(self, part: str) -> None:
        """From here on time belongs to `part`."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._named:
            self._range = torch.profiler.record_function(part)
            self._range.__enter__()
        self._current = part
        self._marks.append((part, self._now()))

    @contextlib.contextmanager
    def inside(self, part: str):
        """The block belongs to `part`, what follows to the part before it."""
        before = self._current
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @contextlib.contextmanager
    def in_turn(self):
        """What the block launches on another stream of a GPU begins after what the model's stream has got so far, and
        what that gets later waits for it. The host waits for neither."""
        if self._stream is None:
            yield
            return
        other = torch.cuda.current_stream(self._stream.device)
        if other == self._stream:
            yield
            return
        other.wait_stream(self._stream)
        try:
            yield
        finally:
            self._stream.wait_stream(other)

    def start(self) -> None:
        """Begin, in `OTHER`."""
        self._marks.clear()
        self.enter(OTHER)

    def finish(self) -> None:
        """End the last part."""
        self._named = False
        self.enter(OTHER)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, all steps together; waits for a GPU."""
        if self._stream is not None:
            self._marks[-1][1].synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[part] += end - begin if self._stream is None else begin.elapsed_time(end) / 1e3
        return found

    def _now(self):
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)  # the stream of the model, whichever is current: what it waits for shows there
        return event


@contextlib.contextmanager
def marked(train_step, timeline: Timeline):
    """Inside the block the steps of `train_step` (a `TrainStep` of a CoCoMix engine) leave marks on the timeline."""
    with contextlib.ExitStack() as stack:
        watch = _Watch(timeline, stack)
        watch.passes(train_step.engine)
        watch.modules(train_step.engine.module)
        watch.call(train_step.supervision, "add_to", LABELS)
        watch.collectives()
        yield


@contextlib.contextmanager
def marked_updates(train_step, timeline: Timeline):
    """Inside the block the steps of `train_step` mark where `OPTIMIZER` begins and ends, and nothing else."""
    with contextlib.ExitStack() as stack:
        _Watch(timeline, stack).passes(train_step.engine)
        yield


class _Watch:
    """Hooks and wrappers that leave marks; `stack` takes them away again."""

    def __init__(self, timeline, stack):
        self.timeline, self.stack = timeline, stack
        self.forward_runs = True  # not so while a backward pass recomputes what checkpointing has dropped

    def enter(self, part):
        """A mark of the forward pass."""
        if self.forward_runs:
            self.timeline.enter(part)

    def before(self, module, part):
        """The part begins when the module is called: ahead of other hooks, which fetch weights at ZeRO stage 3."""
        self._keep(module.register_forward_pre_hook(lambda *_: self.enter(part), prepend=True))

    def after(self, module, part):
        """The part begins when the module returns."""
        self._keep(module.register_forward_hook(lambda *_: self.enter(part)))

    def at_input_gradient(self, module, part):
        """The part's backward pass begins when the gradient of the module's first argument is complete."""
        self._keep(module.register_forward_pre_hook(lambda _, args: self._at_gradient(args[0], part)))

    def at_output_gradient(self, module, part, choose=lambda output: output):
        """The part's backward pass begins when the gradient of (what `choose` takes of) the output is complete."""
        self._keep(module.register_forward_hook(lambda _, __, output: self._at_gradient(choose(output), part)))

    def _keep(self, handle):
        self.stack.callback(handle.remove)

    def _at_gradient(self, tensor, part):
        if self.forward_runs and tensor.requires_grad:
            tensor.register_hook(lambda _: self.timeline.enter(part + BACKWARD))

    def modules(self, model):
        """Borders inside the model. "f blocks" are those from `insert_layer` on, with concepts and without."""
        transformer, config = model.transformer, model.config
        blocks, first = transformer.h, config.insert_layer
        before_first = H_BLOCKS if first > 0 else EMBEDDINGS
        self.before(model, EMBEDDINGS)
        for layer in {0, first}:
            self.before(blocks[layer], H_BLOCKS if layer < first else F_BLOCKS)
        self.after(blocks[-1], LM_HEAD)
        self.at_output_gradient(blocks[-1], F_BLOCKS)
        self.after(model, OTHER)
        if first > 0:
            self.at_input_gradient(blocks[0], EMBEDDINGS)
        last_before = blocks[first - 1] if first > 0 else transformer.wpe
        mixer = getattr(transformer, "compress_layer", getattr(transformer, "pause_tokens", None))
        if predicts_concepts(config.mixing):
            self.after(last_before, CONCEPT_HEAD)
            self.after(transformer.concept_predictor, F_BLOCKS if mixer is None else MIXING)
            self.at_output_gradient(transformer.concept_predictor, CONCEPT_HEAD, lambda head: head.loss)
        elif mixer is not None:
            self.after(last_before, MIXING)
        if mixer is not None:
            self.after(mixer, F_BLOCKS)
            self.at_output_gradient(mixer, MIXING)
        self.at_input_gradient(blocks[first] if mixer is None else mixer, before_first)

    def passes(self, engine):
        """Backward pass and optimizer of the engine. Once autograd has ended, what DeepSpeed does with the gradients
        belongs to the optimizer."""

        def backward(run, loss, **kwargs):
            self.forward_runs = False
            loss.register_hook(
                lambda _: torch.autograd.Variable._execution_engine.queue_callback(
                    lambda: self.timeline.enter(OPTIMIZER)
                )
            )
            self.timeline.enter(LM_HEAD + BACKWARD)
            try:
                return run(loss, **kwargs)
            finally:
                self.forward_runs = True

        def step(run, *args, **kwargs):
            self.timeline.enter(OPTIMIZER)
            try:
                return run(*args, **kwargs)
            finally:
                self.timeline.enter(OTHER)

        self._wrap(engine, "backward", backward)
        self._wrap(engine, "step", step)

    def call(self, owner, name, part):
        """Calls of a method belong to a part."""

        def timed(run, *args, **kwargs):
            with self.timeline.inside(part), self.timeline.in_turn():
                return run(*args, **kwargs)

        self._wrap(owner, name, timed)

    def collectives(self):
        """Collectives are communication, wherever they are called; of those that go on beside the computation only the
        waiting for them is."""

        def timed(run, *args, **kwargs):
            with self.timeline.inside(COMMUNICATION):
                result = run(*args, **kwargs)
            return _Waited(result, self.timeline) if hasattr(result, "wait") else result

        from deepspeed.comm import comm

        for owner in (torch.distributed, comm.cdb):
            for name in _COLLECTIVES:
                if callable(getattr(owner, name, None)):
                    self._wrap(owner, name, timed)

    def _wrap(self, owner, name, around):
        """Replace `owner.name` by a function that calls `around` with it."""
        was_own, original = name in vars(owner), getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(functools.partial(around, original)))
        if was_own:
            self.stack.callback(setattr, owner, name, original)
        else:
            self.stack.callback(delattr, owner, name)


class _Waited:
    """A collective that is under way: waiting for it is communication."""

    def __init__(self, work, timeline):
        self._work, self._timeline = work, timeline

    def wait(self, *args, **kwargs):
        """Wait for it."""
        with self._timeline.inside(COMMUNICATION):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._work, name)
