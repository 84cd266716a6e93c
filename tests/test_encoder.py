"""The encoder that experiments study, against transformers."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))
import encoder  # noqa: E402


@pytest.mark.extra
def test_the_last_block_gives_what_transformers_computes():
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    torch.manual_seed(0)
    model = transformers.MPNetModel(transformers.MPNetConfig(
        vocab_size=90, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=514)).eval()
    tokens = np.random.default_rng(0).integers(3, 90, 300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        expected = model(torch.tensor(tokens)[None]).last_hidden_state[0].numpy()
        params = {name: value.numpy() for name, value in model.state_dict().items()}
    *_, last = encoder.blocks(params, tokens)
    np.testing.assert_allclose(last["out"], expected, atol=1e-4)


def test_distances_fall_into_buckets_by_side_and_logarithm():
    distance = np.arange(-200, 201)
    found = encoder._bucket(distance, 32)
    assert found[200] == 0 and set(found[:200]) <= set(range(1, 16)) and set(found[201:]) <= set(range(16, 32))
    np.testing.assert_array_equal(found[201:208], 16 + np.arange(1, 8))  # near ones by themselves
    np.testing.assert_array_equal(found[:200][::-1] + 16, found[201:])  # as far to the left as to the right
    assert (np.diff(found[201:]) >= 0).all() and found[-1] == 31
