"""A folder appears whole or not at all."""

import pytest

from pipeline.whole_folder import made_whole


def test_it_takes_its_place_at_the_end(tmp_path):
    folder = tmp_path / "deep" / "made"
    with made_whole(folder) as draft:
        (draft / "file").write_text("whole")
        assert not folder.exists()
    assert (folder / "file").read_text() == "whole" and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(tmp_path, failure):
    with pytest.raises(failure), made_whole(tmp_path / "made") as draft:
        (draft / "file").write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_draft_of_a_killed_run_is_not_gone_on_with(tmp_path):
    (tmp_path / "made.draft").mkdir()
    (tmp_path / "made.draft" / "old").write_text("half")
    with made_whole(tmp_path / "made") as draft:
        assert not list(draft.iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]
