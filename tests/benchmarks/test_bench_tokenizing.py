import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_tokenizing


@pytest.mark.slow
def test_all_make_the_same_tokens_and_are_timed_as_often(tmp_path, capsys):
    file = tmp_path / "figures.json"
    figures = bench_tokenizing.main(
        ["--megabytes", "0.3", "--vocab-size", "600", "--rounds", "2", "--json", str(file)]
    )  # which ends where the contestants' tokens differ in number
    assert json.loads(file.read_text())["seconds"] == figures["seconds"]
    assert {name: len(times) for name, times in figures["seconds"].items()} == dict.fromkeys(
        (bench_tokenizing.OURS, bench_tokenizing.ALONE, bench_tokenizing.TIKTOKEN, bench_tokenizing.MAP), 2
    )
    assert "of tokenizers alone" in capsys.readouterr().out
