"""What a person types wrong about bundles: one line, exit code 2, before any work."""

import pytest

from pipeline.tests.test_cli import refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--variants", "onnx_int2"), "--variants onnx_int2: the recipe makes onnx_fp32, onnx_static_int8"),
        (("--variants", " , "), "--variants names nothing"),
        (("--split-mb", "0"), "--split-mb 0: give more than 0"),
        (("--split-mb", "nan"), "--split-mb nan: give more than 0"),
        (("--sign", "none.pem"), "--sign none.pem: cannot be read"),
    ],
)
def test_options_of_a_bundle_are_checked_before_any_work(tmp_path, given, words):
    assert words in refused(tmp_path, "bundle", *given) and not (tmp_path / ".pocketlm").exists()


def test_a_key_that_is_none_is_told(tmp_path):
    (tmp_path / "key").write_text("no key")
    assert "--key key: no public key in PEM; make one with: openssl" in refused(tmp_path, "verify", "nothing", "--key", "key")
