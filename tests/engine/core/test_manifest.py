import json

import pytest

from cocomix.core.errors import CocomixError
from cocomix.core.manifest import FILE, require_sound, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "below" / "config.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_a_sound_folder_passes_and_what_came_later_is_not_looked_at(folder):
    (folder / "concept_names.json").write_text("{}")
    assert require_sound(folder) is True


def test_a_folder_without_a_manifest_passes_and_says_so(tmp_path):
    assert require_sound(tmp_path) is False


@pytest.mark.parametrize("name", ["model.safetensors", "below/config.json"])
@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda content: content[:-1] + b"?", "is damaged"),
        (lambda content: content[:-1], "bytes and had"),
        (lambda content: content + b"\n", "bytes and had"),
        (None, "is missing"),
    ],
)
def test_a_file_that_is_not_as_it_was_is_named_with_the_way_out(folder, name, damage, problem):
    path = folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CocomixError, match=rf"{path} .*{problem}.* delete {folder / FILE}"):
        require_sound(folder)


def test_weights_are_left_aside_where_they_are_not_wanted(folder):
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert require_sound(folder, weights=False) is True


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": {"x": {"bytes": "7", "crc32": "0"}}}'])
def test_a_broken_manifest_is_named(folder, content):
    (folder / FILE).write_text(content)
    with pytest.raises(CocomixError, match=FILE):
        require_sound(folder)


def test_a_changed_manifest_is_noticed(folder):
    content = json.loads((folder / FILE).read_text())
    content["files"]["model.safetensors"]["bytes"] = 8
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(CocomixError, match="is damaged: the checksum"):
        require_sound(folder)
