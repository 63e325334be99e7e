"""A zip in parts: the same bytes whichever way they are read, and a missing part is named."""

import io
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import UserError
from pipeline.zip_parts import existing_parts, joined, part_path, parts_are, parts_beside, remove_parts, split

STEPS = st.lists(
    st.tuples(st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]), st.integers(-80, 80), st.integers(-1, 40)), max_size=12
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=60), size=st.integers(1, 70), steps=STEPS)
def test_parts_read_as_the_whole_from_anywhere(tmp_path_factory, data, size, steps):
    archive = tmp_path_factory.mktemp("parts") / "bundle.zip"
    archive.write_bytes(data)
    parts = split(archive, size)
    assert [len(part.read_bytes()) for part in parts[:-1]] == [size] * (len(parts) - 1) and 0 < parts[-1].stat().st_size <= size
    assert b"".join(part.read_bytes() for part in parts) == data and parts_are(archive, size)
    with joined(parts) as cut:
        plain = io.BytesIO(data)
        assert cut.read() == plain.read() == data
        for whence, offset, count in steps:
            base = {os.SEEK_SET: 0, os.SEEK_CUR: plain.tell(), os.SEEK_END: len(data)}[whence]
            if base + offset >= 0:
                assert cut.seek(offset, whence) == plain.seek(base + offset)
                assert cut.read(count) == plain.read(count)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(range(100)))
    return path


def test_any_part_leads_to_all_and_a_gap_is_named(archive):
    parts = split(archive, 30)
    assert all(parts_beside(part) == parts for part in parts) and [part.name for part in parts] == [f"a.zip.00{i}" for i in (1, 2, 3, 4)]
    parts[1].unlink()
    with pytest.raises(UserError, match=r"a\.zip\.002: this part is missing"):
        parts_beside(parts[0])


def test_parts_of_another_zip_do_not_stay(archive):
    (archive.parent / "b.zip.001").write_bytes(b"another's")
    split(archive, 10)
    assert not parts_are(archive, 30) and not parts_are(archive, None)
    assert split(archive, 50) == existing_parts(archive) == [part_path(archive, 1), part_path(archive, 2)]
    part_path(archive, 2).write_bytes(bytes(50))
    assert not parts_are(archive, 50)
    remove_parts(archive)
    assert parts_are(archive, None) and (archive.parent / "b.zip.001").is_file()


def test_more_parts_than_names_is_the_user_s_mistake(archive):
    archive.write_bytes(bytes(1000))
    with pytest.raises(UserError, match="1000 parts, 999 can be named; give a larger one"):
        split(archive, 1)
