"""What a run says of itself, for tests that need no run."""

from cocomix.training.run_record import DataRecord, RunRecord

RECORD = RunRecord(
    name="run",
    method="interleave",
    concept_labels="cached",
    soft_targets=None,
    device="CPU, 2 threads",
    world_size=1,
    parameters=12096,
    tokens_per_step=128,
    total_steps=8,
    seq_len=16,
    flops_per_token=72960,
    versions={"torch": "2.13.0"},
    config={"model": {"mixing": "interleave"}},
    data=DataRecord(260, 2577, 1271, 24.0),
)
