"""What a model directory says about how to serve it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from helios.errors import InvalidInput

Task = Literal["chat", "completion", "embedding"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """``positions`` is the longest sequence in tokens, ``kv_bytes`` the KV cache of one token in bytes (0: none),
    ``heads`` the number of attention heads (0: unknown)."""

    architecture: str
    task: Task
    positions: int
    kv_bytes: int
    heads: int = 0

    @classmethod
    def read(cls, directory: Path) -> ModelInfo:
        """Read ``config.json`` and what lies beside it; raises InvalidInput when that is no model for vLLM."""
        path = directory / "config.json"
        try:
            config = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InvalidInput(
                f"{directory} has no config.json, so it is no model that vLLM can serve",
                hint="Name the directory that holds config.json and the weights, as save_pretrained writes them.",
            ) from None
        except ValueError as error:
            raise InvalidInput(f"{path} is not valid JSON: {error}") from None
        names = config.get("architectures") if isinstance(config, dict) else None
        architecture = str(names[0]) if isinstance(names, list) and names else "unknown"
        if not isinstance(config, dict):
            raise InvalidInput(f"{path} is not a JSON object")
        text = config.get("text_config")
        sizes = text if isinstance(text, dict) else config
        return cls(
            architecture=architecture,
            task=_task(directory, architecture),
            positions=_count(sizes, "max_position_embeddings", "n_positions", "max_sequence_length") or 2048,
            kv_bytes=_kv_bytes(sizes),
            heads=_count(sizes, "num_attention_heads", "n_head"),
        )


WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Files of weights, in the order in which vLLM prefers them."""


def weight_bytes(directory: Path) -> int:
    """Bytes of a model's weights on disk, of the kind of files that vLLM would load; 0 where there are none.

    Mistral's ``consolidated*`` files are a second copy where others lie beside them.
    """
    for pattern in WEIGHTS:
        if found := list(directory.glob(pattern)):
            others = [path for path in found if not path.name.startswith("consolidated")]
            return sum(path.stat().st_size for path in others or found)
    return 0


def _task(directory: Path, architecture: str) -> Task:
    pools = (directory / "modules.json").exists()  # a sentence-transformers model
    if pools or not architecture.endswith(("CausalLM", "ConditionalGeneration", "LMHeadModel", "unknown")):
        return "embedding"
    if any((directory / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return "chat"
    tokenizer = directory / "tokenizer_config.json"
    return "chat" if tokenizer.exists() and b'"chat_template"' in tokenizer.read_bytes() else "completion"


def _count(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _kv_bytes(config: dict[str, Any]) -> int:
    layers = _count(config, "num_hidden_layers", "n_layer")
    heads = _count(config, "num_attention_heads", "n_head")
    size = _count(config, "head_dim") or _count(config, "hidden_size", "n_embd") // max(heads, 1)
    return 2 * 2 * layers * _count(config, "num_key_value_heads", "num_attention_heads", "n_head") * size
