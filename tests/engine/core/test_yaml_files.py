import pytest

from cocomix.core.errors import CocomixError
from cocomix.core.yaml_files import load_yaml, require_shallow


def test_settings_come_as_they_stand(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {lr: 1e-3, text: [a, 'b']}\n")
    assert load_yaml(tmp_path / "a.yaml", "config file") == {"train": {"lr": 1e-3, "text": ["a", "b"]}}


@pytest.mark.parametrize(
    "content, problem",
    [
        ("train: [1", r"a\.yaml, line 1, column 10: this is not valid YAML"),
        ("a: 1\nb: 'x\n", r"a\.yaml, line 3, column 1: this is not valid YAML"),
        ("a: \x01", r"a\.yaml.* is not valid YAML"),
        (b"a: \xff", r"a\.yaml is not valid YAML"),
        ("a: " + "[" * 100_000, "nested more than 64 levels"),
        ("- " * 100_000 + "1", "nested more than 64 levels"),
        ("".join(" " * level + "a:\n" for level in range(1000)), "line 65: nested more than 64 levels"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, problem):
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CocomixError, match=problem) as raised:
        load_yaml(tmp_path / "a.yaml", "config file")
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_called_what_it_should_be(tmp_path):
    with pytest.raises(CocomixError, match=f"no config file at {tmp_path}/b.yaml"):
        load_yaml(tmp_path / "b.yaml", "config file")


def test_what_is_as_deep_as_settings_are_passes():
    require_shallow("{a: [[{b: 1}], [2]]}", "override")
