"""A tiny Llama made on the spot: random weights, a tokenizer of its own, a chat template, several safetensors shards.

It needs no network and a second or two. The same seed gives the same bytes on every machine, hence the same commit:
weights come from the raw output of PCG64 (which numpy keeps stable; its distributions it does not), rounded to bf16
here, and the tokenizer is trained on text generated from the word list below. Nothing imports torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

GENERATOR: Final = 1
"""Raised whenever the bytes made for a seed change."""
SPECIAL: Final = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE: Final = (
    "<|begin|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

WORDS: Final = tuple(
    """
about above across after again against air all almost along always among animal answer any around ask away back bank
base be beautiful because become before began begin behind being below best better between big bird black blue boat body
book both box boy bread bring brother build built busy call came can car care carry center change child children choose
city class clear close cold color come common complete connect could country course cover cross cut dark day decide deep
develop differ direct distance door down draw dream drive dry during each early earth ease east eat end energy enough
even evening ever every example eye face fact fall family far farm fast father feel few field figure fill final find
fine fire first fish five floor flow flower fly follow food foot force forest form forward found four free fresh friend
from front full game garden gave general gentle get girl give glass gold good grand grass gray great green ground group
grow guess half hand happen happy hard head hear heart heat heavy help here high hill history hold home horse hot hour
house human hundred idea inch interest island join jump just keep kind king knew know lake land language large last late
laugh law lead learn leave left less letter life light like line list listen little live long look lost love low machine
made main make many map mark market matter may mean measure meet memory men might mile milk mind minute miss model
money month moon more morning most mother mountain mouth move much music must name nation nature near need never new
next night nine north note nothing notice number object ocean off office often oil old once one only open order other
our out over own page paper part pass past pattern people perhaps person picture piece place plain plan plane plant play
point poor port power press problem produce product pull push question quick quiet rain reach read ready real reason
record red remember rest result rich ride right ring rise river road rock room round rule run safe said sail same sand
saw say school science sea season second secret see seed seem self sentence serve set seven several shape share sharp
ship shore short should show side sign silver simple since sing sister sit six size sky sleep slow small smile snow some
song soon sound south space speak special spell spring square stand star start state stay step still stone stood stop
store story street strong student study such sudden summer sun sure surface surprise swim system table take talk tall
teach team tell ten test than thank that their them then there these they thing think third this those thought thousand
three through time together told tomorrow took top toward town track trade train travel tree true try turn two under
unit until upon use usual valley very view village visit voice vowel wait walk wall want warm wash watch water wave way
weather week weight well went west what wheel when where which while white who whole why wide wild will wind window
winter wire wise wish with wonder wood word work world would write wrong year yellow yes yesterday young
""".split()  # noqa: SIM905 - a list of strings would take 700 lines
)


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes of the model: lengths are in elements, ``shard_bytes`` in bytes."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 768
    vocabulary: int = 4096
    positions: int = 2048
    shard_bytes: int = 3 << 20

    @property
    def head(self) -> int:
        return self.hidden // self.heads


def tiny_llama(models: Path, seed: int = 0, shape: TinyShape = TinyShape()) -> Path:
    """Make the model in a directory below ``models``, unless it is there, and return the directory.

    It appears whole or not at all, also when two processes make it at once.
    """
    target = models / f"tiny-llama-v{GENERATOR}-seed{seed}"
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models))
    try:
        write_model(work, seed, shape)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def write_model(directory: Path, seed: int, shape: TinyShape) -> None:
    """Write config, tokenizer and weights into an existing directory."""
    _write_json(directory / "config.json", _config(shape))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False},
    )
    _write_tokenizer(directory, shape)
    _write_weights(directory, seed, shape)


def _config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _sentences(count: int) -> Iterator[str]:
    """Text to train the tokenizer on: words of the list with endings, invented words, numbers and punctuation."""
    random = Random(20)  # noqa: S311 - text, not secrets

    def pick(items: Sequence[str]) -> str:
        return items[int(random.random() * len(items))]  # of Random's methods, random() is stable across versions

    endings = ("", "", "", "", "s", "ed", "ing", "er", "ly", "ness", "ful", "less", "able", "ment")
    onsets = (*"bcdfghjklmnprstvw", "br", "cr", "dr", "pl", "st", "tr")
    rimes = (*"aeiou", "an", "en", "in", "on", "ar", "or")
    for _ in range(count):
        words = []
        for _ in range(6 + int(random.random() * 8)):
            kind = random.random()
            if kind < 0.8:
                words.append(pick(WORDS) + pick(endings))
            elif kind < 0.95:
                words.append("".join(pick(onsets) + pick(rimes) for _ in range(2 + int(random.random() * 2))))
            else:
                words.append(str(int(random.random() * 10000)))
        words[0] = words[0].capitalize()
        yield " ".join(words) + pick(".?!,;:")


def _write_tokenizer(directory: Path, shape: TinyShape) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers as hf

    library: Any = hf
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(12_000), trainer)
    if tokenizer.get_vocab_size() != shape.vocabulary:
        raise AssertionError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {shape.vocabulary}")
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[1],
            "pad_token": SPECIAL[2],
            "model_max_length": shape.positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _tensors(shape: TinyShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors, in loading order."""
    h, kv = shape.hidden, shape.kv_heads * shape.head
    yield "model.embed_tokens.weight", (shape.vocabulary, h)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (h,)
        yield f"{layer}.self_attn.q_proj.weight", (h, h)
        yield f"{layer}.self_attn.k_proj.weight", (kv, h)
        yield f"{layer}.self_attn.v_proj.weight", (kv, h)
        yield f"{layer}.self_attn.o_proj.weight", (h, h)
        yield f"{layer}.post_attention_layernorm.weight", (h,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.intermediate, h)
        yield f"{layer}.mlp.up_proj.weight", (shape.intermediate, h)
        yield f"{layer}.mlp.down_proj.weight", (h, shape.intermediate)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (shape.vocabulary, h)


def _write_weights(directory: Path, seed: int, shape: TinyShape) -> None:
    import numpy as np

    bits = np.random.PCG64(seed)
    shards: list[dict[str, tuple[tuple[int, ...], bytes]]] = [{}]
    room = shape.shard_bytes
    for name, dimensions in _tensors(shape):
        data = _bf16(bits, dimensions)
        if len(data) > room and shards[-1]:
            shards.append({})
            room = shape.shard_bytes
        shards[-1][name] = dimensions, data
        room -= len(data)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / file, shard)
        where |= dict.fromkeys(shard, file)
    total = sum(len(data) for shard in shards for _, data in shard.values())
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_safetensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> None:
    """Write bf16 tensors in the order given (the library's own writer changed its interface between releases)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dimensions, data) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data for _, data in tensors.values())


def _bf16(bits: np.random.PCG64, dimensions: tuple[int, ...]) -> bytes:
    """Ones for a norm, else uniform values of variance 1 / (columns): little-endian bf16, rounded half up."""
    import numpy as np

    count = math.prod(dimensions)
    if len(dimensions) == 1:
        values = np.ones(count, np.float32)
    else:
        raw = bits.random_raw(count)
        unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)  # 24 bits: [-1, 1)
        values = unit * np.float32(math.sqrt(3.0 / dimensions[-1]))
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2").tobytes()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
