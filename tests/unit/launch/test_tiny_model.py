"""The tiny Llama: the same bytes for a seed, a model that the real libraries load."""

import hashlib
import json
import threading

import pytest

from helios.launch.tiny_model import TinyShape, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models"))


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_a_seed_gives_the_same_bytes_and_another_seed_other_weights(model, tmp_path):
    again = tiny_llama(tmp_path / "again")
    other = tiny_llama(tmp_path / "other", seed=1)
    assert digests(again) == digests(model)
    changed = {name for name, digest in digests(other).items() if digests(model)[name] != digest}
    assert changed == {name for name in digests(model) if name.endswith(".safetensors")}


def test_the_bytes_are_those_of_every_machine(model):
    # Raise tiny_model.GENERATOR when this changes on purpose.
    assert (
        digests(model)["model-00004-of-00004.safetensors"]
        == "5873177a7cafbe20277e4953225ff52a88865f5600bef4f5a5037b2ebb52b61f"
    )
    assert digests(model)["tokenizer.json"] == "576a57128d348c1ae26b7276b281e1329d9a402d415c0dbe2592d2aa74e09ec9"


def test_a_second_call_reuses_the_directory(model):
    before = model.stat().st_mtime_ns
    assert tiny_llama(model.parent) == model
    assert model.stat().st_mtime_ns == before
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_two_at_once_make_one(tmp_path):
    made = []
    threads = [threading.Thread(target=lambda: made.append(tiny_llama(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1]
    assert list(tmp_path.iterdir()) == [made[0]]


def test_what_was_interrupted_is_not_visible(tmp_path, monkeypatch):
    import helios.launch.tiny_model as module

    monkeypatch.setattr(module, "_write_weights", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tiny_llama(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_shards_hold_every_tensor_once(model):
    from safetensors import safe_open

    index = json.loads((model / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    total = 0
    for shard in shards:
        with safe_open(model / shard, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert index["weight_map"][name] == shard
                assert file.get_slice(name).get_dtype() == "BF16"
        total += (model / shard).stat().st_size
    assert index["metadata"]["total_size"] < total < index["metadata"]["total_size"] + 64 * 1024


def test_the_tokenizer_and_its_chat_template(model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TinyShape().vocabulary
    text = "Ships sail the sea: naïve ☕ 123\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the river and the mountain").ids) < 10
    assert tokenizer.token_to_id("<|begin|>") == json.loads((model / "config.json").read_text())["bos_token_id"]


@pytest.mark.slow
def test_transformers_loads_it_and_its_answer_depends_on_the_question(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    llama = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert llama.dtype == torch.bfloat16
    answers = set()
    for question in ("What is the sea?", "Name a bird."):
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answers.add(tuple(llama.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()[-8:]))
    assert len(answers) == 2
