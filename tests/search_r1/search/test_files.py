"""What is written takes its place whole, or leaves no trace."""

import pytest

from search_r1.search.index.files import replacing


@pytest.mark.parametrize("several_writers", [False, True])
def test_a_file_takes_its_place_at_the_end(tmp_path, several_writers):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, several_writers) as pending:
        pending.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as pending:
        if kind == "folder":
            (pending / "deep").mkdir(parents=True)
        elif kind == "file":
            pending.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    left = tmp_path / "file.tmp"
    left.mkdir()
    (left / "part").touch()
    with replacing(tmp_path / "file") as pending:
        pending.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path, True) as one, replacing(path, True) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
