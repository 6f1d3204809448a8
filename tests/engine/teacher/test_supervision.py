from types import SimpleNamespace

import pytest

from cocomix.core.config import Config, DistillationConfig, ModelConfig
from cocomix.core.shapes import TeacherShape
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
