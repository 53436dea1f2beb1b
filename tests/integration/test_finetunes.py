"""Fine-tunes of one base: the store grows by about the tensors that changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS = 6


def tensors(seed: int) -> dict[str, np.ndarray]:
    """A small model's weights: per layer two large matrices, a bias and a norm, all random."""
    random = np.random.default_rng(seed)
    out = {"embed": random.standard_normal((2048, 512), np.float32)}
    for layer in range(LAYERS):
        out[f"layers.{layer}.attn"] = random.standard_normal((768, 512), np.float32)
        out[f"layers.{layer}.mlp"] = random.standard_normal((2048, 768), np.float32)
        out[f"layers.{layer}.bias"] = random.standard_normal(2048, np.float32)
        out[f"layers.{layer}.norm"] = np.ones(512, np.float32)
    return out


def write(directory, weights: dict[str, np.ndarray], note: str) -> int:
    """Write a model of two shards and a configuration; returns its bytes."""
    directory.mkdir()
    names = sorted(weights)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = {name: weights[name] for name in part}
        save_file(shard, directory / f"model-0000{number}-of-00002.safetensors", {"note": note})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "note": note}))
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.fixture
def push(helios, tmp_path):
    def run(name: str, weights: dict[str, np.ndarray]) -> dict[str, int]:
        size = write(tmp_path / name, weights, f"the note of {name}")
        pushed = helios("push", tmp_path / name, f"team/{name}", "--json").json()
        assert pushed["logical_bytes"] == size
        assert pushed["new_bytes"] + pushed["deduplicated_bytes"] == size
        return pushed

    return run


def stored(home) -> int:
    """What the objects take on the disk, in bytes."""
    return sum(path.stat().st_size for path in home.store.rglob("*") if path.is_file())


def test_two_fine_tunes_cost_about_what_they_changed(helios, helios_home, push):
    base = tensors(1)
    first = {**base, "layers.2.attn": base["layers.2.attn"] + 1, "layers.5.norm": base["layers.5.norm"] * 2}
    second = {**base, **{f"layers.{n}.mlp": base[f"layers.{n}.mlp"] - 1 for n in (0, 4)}}
    with_base = push("base", base)
    assert with_base["deduplicated_bytes"] < 0.01 * with_base["logical_bytes"]
    rows = [("base", with_base["logical_bytes"], with_base["logical_bytes"], stored(helios_home))]
    for name, weights in (("first", first), ("second", second)):
        changed = sum(weights[n].nbytes for n in weights if weights[n] is not base[n])
        before = stored(helios_home)
        pushed = push(name, weights)
        grown = stored(helios_home) - before
        rows.append((name, pushed["logical_bytes"], changed, grown))
        # Beside the changed tensors: headers, and the small tensors that share a chunk with a changed one.
        assert changed <= pushed["new_bytes"] <= changed + 200_000
        assert pushed["new_bytes"] <= grown <= pushed["new_bytes"] + 50_000
    print("\nmodel      logical   changed     store grew by")
    for name, logical, changed, grown in rows:
        print(f"{name:8}{logical:10}{changed:10}{grown:18}")
    usage = helios("show", "team/second", "--json").json()
    assert usage["refs"]["main"]


def test_a_longer_header_moves_every_tensor_and_shares_them_all(push):
    base = tensors(2)
    push("base", base)
    moved = push("renamed", {**base, "zzz.extra": np.arange(64, dtype=np.float32)})
    assert moved["new_bytes"] < 0.02 * moved["logical_bytes"]


def test_unrelated_models_share_nothing_and_say_so(push):
    push("one", tensors(3))
    other = push("other", tensors(4))
    assert other["new_bytes"] > 0.99 * other["logical_bytes"]
