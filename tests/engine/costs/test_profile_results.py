"""A profile's file: read as it was written, older ones too, and refused where it cannot be one."""

import json
from pathlib import Path

import pytest

from cocomix.core.errors import CocomixError
from cocomix.core.files import write_json
from cocomix.costs.profile_results import ProfileResults, Spread

OLD = Path(__file__).parents[3] / "benchmarks/results/profile-cpu-4-threads.json"


def test_a_profile_is_read_as_it_was_written(tmp_path):
    found = ProfileResults.read(OLD)
    write_json(tmp_path / "new.json", found.as_json())
    assert ProfileResults.read(tmp_path / "new.json") == found
    written = json.loads((tmp_path / "new.json").read_text())
    assert written["kind"] == "profile" and list(written["methods"]) == list(found.methods)
    old = json.loads(OLD.read_text())
    assert written["student"].pop("concept_residual") is False  # which 0.1 did not have
    assert written["student"].pop("concept_every") == 1
    assert written.pop("teacher_product_flops_per_s") is written["settings"].pop("teacher_precision") is None
    assert {name: old[name] for name in written if name != "methods"} | {"methods": old["modes"]} == written


def test_a_spread_is_a_median_with_percentiles():
    assert Spread.of(range(11)) == Spread(median=5, p10=1, p90=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.update(kind="run"), "is not a profile: expected what `cocomix profile --json FILE` writes"),
        (lambda file: file.pop("settings"), "missing required field `settings`"),
        (lambda file: file["modes"]["ntp"].update(mfu="high"), r"Expected `float`, got `str` - at .*mfu"),
        (lambda file: file["modes"]["ntp"]["step_s"].pop("median"), r"missing required field `median` - at .*step_s"),
        (lambda file: file.update(modes=[]), r"Expected `object`, got `array` - at `\$.methods`"),
    ],
)
def test_what_is_not_a_profile_is_refused(tmp_path, change, message):
    content = json.loads(OLD.read_text())
    change(content)
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(CocomixError, match=message):
        ProfileResults.read(tmp_path / "p.json")
