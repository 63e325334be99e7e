"""What the tests of the ONNX quantisations share: random text, and the fp32 exports that they begin with, each made once."""

import numpy as np
import pytest
import torch

from conftest import VOCABULARY, tiny_model
from exporters import onnx_export
from exporters.settings import OnnxSettings

WINDOW = 40
CASES = [("llama", True), ("llama", False), ("qwen3", True), ("gpt2", True)]  # family and whether embedding and head are tied


class Exports(dict):
    """The fp32 stage's folder by ``(family, tied)``, exported when first asked for."""

    def __init__(self, text, tmp_path_factory):
        self.text, self.factory = text, tmp_path_factory

    def __missing__(self, case):
        family, tied = case
        folder = self.factory.mktemp(f"{family}-{tied}")
        tiny_model(family, tied=tied).save_pretrained(folder / "model")
        (folder / "out").mkdir()
        onnx_export.run(OnnxSettings(greedy_tokens=1), folder / "out", model=folder / "model", text=self.text)
        self[case] = folder / "out"
        return self[case]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Random windows as the text stage writes them."""
    folder = tmp_path_factory.mktemp("text")
    draws = np.random.default_rng(0)
    for name, windows in (("calibration", 6), ("validation", 2)):
        np.save(folder / f"{name}.npy", draws.integers(0, VOCABULARY, (windows, WINDOW), dtype=np.int32))
    return folder


@pytest.fixture(scope="session")
def exports(text, tmp_path_factory) -> Exports:
    return Exports(text, tmp_path_factory)
