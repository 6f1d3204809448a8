import dataclasses
import json

import pytest
from record_helpers import RECORD

from cocomix.core.errors import CocomixError
from cocomix.training.run_record import Branch, RunRecord, new_id, recorded_id

DATA = RECORD.as_json()["data"]


def write(folder, **changes):
    (folder / "run.json").write_text(json.dumps(RECORD.as_json() | changes))


def test_what_is_written_is_read_back(tmp_path):
    RECORD.write(tmp_path)
    assert RunRecord.read(tmp_path) == RECORD
    assert list(json.loads((tmp_path / "run.json").read_text()))[:4] == [
        "name",
        "method",
        "concept_labels",
        "soft_targets",
    ]


def test_records_of_version_0_1_are_read_under_the_names_of_today(tmp_path):
    values = RECORD.as_json()
    values["mode"], values["labels"] = values.pop("method"), values.pop("concept_labels")
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert RunRecord.read(tmp_path) == RECORD
    for key in ("soft_targets", "flops_per_token"):  # which came with later versions
        del values[key]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert RunRecord.read(tmp_path) == dataclasses.replace(RECORD, flops_per_token=None)


def test_a_run_has_an_id_but_for_those_of_earlier_versions(tmp_path):
    dataclasses.replace(RECORD, id=new_id()).write(tmp_path)
    assert recorded_id(tmp_path) == RunRecord.read(tmp_path).id != new_id()
    values = RECORD.as_json()
    del values["id"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert recorded_id(tmp_path) is None
    (tmp_path / "run.json").unlink()
    assert recorded_id(tmp_path) != recorded_id(tmp_path)


def test_keys_of_a_later_version_are_no_error(tmp_path):
    write(tmp_path, weather="fine")
    assert RunRecord.read(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "blend"}, "method is 'blend'; it must be one of"),
        ({"parameters": True}, r"Expected `int`, got `bool` - at `\$.parameters`"),
        ({"flops_per_token": 0}, r"Expected `float` > 0.0 - at `\$.flops_per_token`"),
        ({"versions": []}, r"Expected `object`, got `array` - at `\$.versions`"),
        ({"data": {"vocab_size": 1}}, r"missing required field `train_tokens` - at `\$.data`"),
        (
            {"data": {**RECORD.as_json()["data"], "val_tokens": "many"}},
            r"Expected `int`, got `str` - at `\$.data.val_tokens`",
        ),
    ],
)
def test_a_record_with_wrong_values_is_refused_by_name(tmp_path, changes, reason):
    write(tmp_path, **changes)
    with pytest.raises(CocomixError, match=reason):
        RunRecord.read(tmp_path)


def test_a_record_that_is_not_there_or_lacks_a_key_is_refused(tmp_path):
    with pytest.raises(CocomixError, match="is missing"):
        RunRecord.read(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "run"}')
    with pytest.raises(CocomixError, match="run.json: Object missing required field `method`"):
        RunRecord.read(tmp_path)


def test_the_cost_of_a_run_is_its_arithmetic_a_token():
    assert RECORD.flops(100) == 100 * RECORD.flops_per_token and RECORD.flops(0) == 0
    assert RECORD.cost(100) == [(0, 0), (100, 100 * RECORD.flops_per_token)]
    assert dataclasses.replace(RECORD, flops_per_token=None).flops(100) is None


def test_a_run_that_began_with_another_costs_what_that_did_until_then():
    ntp = dataclasses.replace(RECORD, flops_per_token=10.0)
    grown = dataclasses.replace(RECORD, flops_per_token=30.0, branched_from=branch_of(ntp, 40))
    assert [grown.flops(tokens) for tokens in (0, 20, 40, 50)] == [0, 200, 400, 700]
    again = dataclasses.replace(grown, branched_from=branch_of(grown, 60))
    assert [again.flops(tokens) for tokens in (20, 40, 50, 60, 70)] == [200, 400, 700, 1000, 1300]
    assert again.cost(60) == [(0, 0), (40, 400), (60, 1000)]


def test_a_branch_of_an_early_version_costs_as_much_before_as_after():
    record = dataclasses.replace(RECORD, flops_per_token=30.0, branched_from=Branch("other", 2))
    assert record.flops(100) == 3000


def branch_of(record, tokens):
    return Branch("source", 1, tuple(record.cost(tokens)))


def test_where_a_run_began_and_what_that_cost_is_read_back(tmp_path):
    grown = dataclasses.replace(RECORD, branched_from=branch_of(RECORD, 40), supervision_flops_per_token=7.0)
    grown.write(tmp_path)
    assert RunRecord.read(tmp_path) == grown
