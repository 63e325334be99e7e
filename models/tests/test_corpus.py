"""The demo corpus: who may be read, what is left out, and that no file stands in two splits."""

from email.message import Message

import pytest

from models import corpus
from models.demo_data import choose, write_demo_texts

FUNCTION = "def area(width, height):\n    return width * height\n\n\n"


def metadata(**fields: str | list[str]) -> Message:
    """Package metadata with these fields; underscores stand for hyphens."""
    message = Message()
    message["Name"] = "some-package"
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"License_Expression": "Apache-2.0 OR BSD-2-Clause"}, "Apache-2.0 AND BSD-2-Clause"),
        ({"Classifier": ["Topic :: Utilities", "License :: OSI Approved :: BSD License"]}, "BSD"),
        ({"Classifier": "License :: OSI Approved :: Python Software Foundation License"}, "PSF-2.0"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
    ],
)
def test_permissive_licences_are_named(stated, licence):
    assert corpus.permissive_licence(metadata(**stated)) == licence


@pytest.mark.parametrize(
    "stated",
    [
        {"License_Expression": "MPL-2.0"},
        {"License_Expression": "MPL-2.0 AND MIT"},
        {"License_Expression": "MPL-2.0", "Classifier": "License :: OSI Approved :: MIT License"},
        {
            "Classifier": [
                "License :: OSI Approved :: MIT License",
                "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
            ]
        },
        {"License": "GPL-3.0"},
        {"License": "MIT-ish, ask us\nand pay"},
        {},
    ],
)
def test_other_licences_are_refused(stated):
    with pytest.raises(ValueError, match="some-package: licence .* drop it from PACKAGES"):
        corpus.permissive_licence(metadata(**stated))


def test_an_installed_mpl_package_is_refused():
    with pytest.raises(ValueError, match="MPL-2.0"):
        corpus.collect(packages=("tqdm",), cap_bytes=5_000)


def test_every_listed_package_states_a_permissive_licence():
    for name in corpus.PACKAGES:
        assert corpus.permissive_licence(corpus.importlib.metadata.metadata(name))


@pytest.fixture(scope="module")
def sources() -> list[corpus.Source]:
    return corpus.collect(packages=("pluggy", "h11", "click"), cap_bytes=400_000)


def test_no_path_or_text_occurs_twice(sources):
    assert len({source.path for source in sources}) == len({source.text for source in sources}) == len(sources) > 20


def test_no_package_exceeds_its_cap(sources):
    sizes = {}
    for source in sources:
        sizes[source.package] = sizes.get(source.package, 0) + len(source.text)
    assert set(sizes) == {corpus.STANDARD_LIBRARY, "pluggy", "h11", "click"}
    assert max(sizes.values()) <= 400_000


def test_the_split_of_a_file_depends_on_its_path_alone():
    paths = [f"package/module_{number}.py" for number in range(20_000)]
    splits = [corpus.split_of(path) for path in paths]
    assert splits == [corpus.split_of(path) for path in paths]
    for name, per_mille in corpus.SPLITS:
        assert splits.count(name) == pytest.approx(per_mille * 20, rel=0.35)
    assert splits.count("train") > 0.97 * len(paths)


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n",
        "this is no Python at all " * 40,
        "# Automatically generated, do not edit\n" + FUNCTION * 20,
        "table = [" + "123456789, " * 200 + "]\n",
        FUNCTION * 20 + "token = '<|endoftext|>'\n",
        FUNCTION * 3000,
    ],
    ids=["tiny", "unparsable", "generated", "data", "end of text", "huge"],
)
def test_files_not_worth_reading(text):
    assert not corpus.worth_reading(text)
    assert corpus.worth_reading(FUNCTION * 20)


def test_a_near_duplicate_is_seen():
    lines = [f"result_{number} = compute_something({number})" for number in range(10)]
    seen: set[int] = set()
    assert not corpus._nearly_seen("\n".join(lines), seen)
    assert corpus._nearly_seen("\n".join([*lines[:5], *(f"other_name_{n} = something_else({n})" for n in range(5))]), seen)
    assert not corpus._nearly_seen("\n".join(f"a_new_name_{n} = another_function({n})" for n in range(10)), seen)


def test_the_demo_texts_are_whole_files_of_their_split(tmp_path):
    texts = [(f"click/module_{n}.py", FUNCTION + f"NUMBER = {n}\n") for n in range(2_000)]
    sources = [corpus.Source("click", "8.0", "BSD-3-Clause", path, text) for path, text in texts]
    write_demo_texts(sources, tmp_path)
    for split, name in (("calibration", "calibration.txt"), ("held-out", "heldout.txt")):
        written = (tmp_path / name).read_text("utf-8")
        expected = {source.text for source in sources if corpus.split_of(source.path) == split}
        assert expected
        assert written.count("def area") == len(expected)
        assert all(text in written for text in expected)
    notes = (tmp_path / "LICENSES.md").read_text("utf-8")
    assert "| click | 8.0 | BSD-3-Clause |" in notes
    assert (tmp_path / "licences" / "click.txt").stat().st_size > 500


def test_chosen_files_stay_within_the_limit(sources):
    chosen = choose(sources, 50_000)
    assert 20_000 < sum(len(source.text.encode()) for source in chosen) <= 50_000
