"""The kinds of supervision: which a method wants, what their work is together, and random ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from cocomix.core.config import Config, DistillationConfig, ModelConfig
from cocomix.core.errors import CocomixError
from cocomix.core.shapes import TeacherShape
from cocomix.teacher.concept_labels import RandomLabels
from cocomix.teacher.soft_targets import RandomSoftTargets
from cocomix.teacher.supervision import KINDS, Supervision, learns_from, teacher_shape, wanted_kinds


@pytest.mark.parametrize(
    "mixing, weight, names",
    [
        ("interleave", 0.0, ("labels",)),
        ("predict", 0.5, ("labels", "soft targets")),
        ("pause", 0.5, ("soft targets",)),
        ("none", 0.0, ()),
    ],
)
def test_a_student_learns_from_what_its_method_wants(mixing, weight, names):
    config = Config(model=ModelConfig(mixing=mixing), distillation=DistillationConfig(weight=weight))
    assert learns_from(config) == names == tuple(kind.name for kind in wanted_kinds(config))


def test_kinds_have_names_and_cache_folders_of_their_own():
    config = Config()
    config.concept_labels.cache, config.distillation.cache = "one", "two"
    assert [kind.cache_folder(config) for kind in KINDS] == ["one", "two"]
    for what in ("name", "cache_class"):
        assert len({getattr(kind, what) for kind in KINDS}) == len(KINDS)


def test_the_shape_of_the_teachers_work_does_not_depend_on_their_order():
    labels = SimpleNamespace(shape=TeacherShape(16, 3, 1, 400, 64))
    soft = SimpleNamespace(shape=TeacherShape(16, 3, 0, 400, 0, labels_by=None, soft_targets=True))
    both = TeacherShape(16, 3, 1, 400, 64, soft_targets=True)
    assert teacher_shape({"labels": labels, "soft": soft}) == teacher_shape({"soft": soft, "labels": labels}) == both
    assert teacher_shape({"labels": labels}) == labels.shape and teacher_shape({}) is None


def test_a_part_of_it_alone_keeps_its_fingerprints():
    sources = {name: SimpleNamespace(fingerprints={"data": name}) for name in ("labels", "soft targets")}
    whole = Supervision(caches=sources)
    assert whole.fingerprints() == {"the labels' data": "labels", "the soft targets' data": "soft targets"}
    assert whole.of("labels").fingerprints() == {"the labels' data": "labels"}
    assert (whole.kind("labels"), whole.of("labels").kind("soft targets")) == ("cached", None)


def test_random_labels_are_such_as_a_cache_holds():
    labels = RandomLabels(40, 16, 3)
    for index in range(20):
        window = labels.window(index)["concept_labels"]
        assert window.shape == (16, 3) and window.dtype == np.int64
        assert (window[-1] == -1).all() and window[:-1].min() >= 0 and window.max() < 40
        assert all(len(set(row)) == 3 for row in window[:-1].tolist())
        assert (labels.window(index)["concept_labels"] == window).all()
    with pytest.raises(CocomixError, match="label_topk"):
        RandomLabels(2, 16, 3)


def test_random_soft_targets_are_such_as_a_cache_holds():
    targets = RandomSoftTargets(30, 16, 5)
    for index in range(10):
        window = targets.window(index)
        ids, probabilities = window["soft_target_ids"], np.exp(window["soft_target_log_probs"].astype(np.float64))
        assert ids.shape == probabilities.shape == (16, 5) and ids.dtype == np.int64 and 0 <= ids.min() < ids.max() < 30
        assert all(len(set(row)) == 5 for row in ids.tolist())
        assert (np.diff(probabilities) < 0).all() and np.allclose(probabilities.sum(1), 0.5, atol=1e-3)
    with pytest.raises(CocomixError, match="distillation.top_k is 31 but the vocabulary has 30 tokens"):
        RandomSoftTargets(30, 16, 31)
