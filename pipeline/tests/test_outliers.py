"""Outliers change activations and nothing else."""

import pytest
import torch

from conftest import VOCABULARY, tiny_model
from pipeline.outliers import inject
from pipeline.smooth import channel_maxima, folds_of


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_function_stays_and_the_activations_have_outliers(family):
    windows = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, changed = tiny_model(family).double(), tiny_model(family).double()
    inject(changed, channels=3, factor=40.0, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(changed(windows).logits, plain(windows).logits, rtol=0, atol=1e-6)
    plain, changed = plain.float(), changed.float()
    before, after = (channel_maxima(model, folds_of(model), windows) for model in (plain, changed))
    for fold, old, new in zip(folds_of(plain), before, after, strict=True):
        grown = (new / old > 30).sum()
        assert grown == 3 * fold.shared, fold.name
