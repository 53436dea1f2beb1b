"""Starting vLLM: what a directory says, which arguments follow, what the log tells, how a death at start is shown."""

import contextlib
import json
import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import zmq

from helios.errors import DeadlineExceeded, InvalidInput, Unavailable
from helios.home import Home
from helios.launch import plan, vllm
from helios.launch.model_info import ModelInfo, weight_bytes
from helios.launch.phases import FIRST, Phases
from helios.launch.processes import Children

GIB = 1 << 30


def write(directory, config, **files):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


def test_a_chat_model(tmp_path):
    template = {"tokenizer_config__json": '{"chat_template": "x"}'}
    info = ModelInfo.read(write(tmp_path / "m", LLAMA, **template))
    assert info == ModelInfo("LlamaForCausalLM", "chat", 131072, 2 * 2 * 32 * 8 * 128, 32)


@pytest.mark.parametrize(
    ("config", "files", "task"),
    [
        (LLAMA, {}, "completion"),
        (LLAMA, {"tokenizer_config__json": "{}"}, "completion"),
        (LLAMA, {"chat_template__jinja": "x"}, "chat"),
        (LLAMA, {"modules__json": "[]", "chat_template__jinja": "x"}, "embedding"),
        ({"architectures": ["BertModel"]}, {}, "embedding"),
        ({}, {}, "completion"),
    ],
)
def test_the_task(tmp_path, config, files, task):
    assert ModelInfo.read(write(tmp_path / "m", config, **files)).task == task


def test_the_text_part_of_a_multimodal_model_counts(tmp_path):
    config = {"architectures": ["XForConditionalGeneration"], "text_config": LLAMA}
    assert ModelInfo.read(write(tmp_path / "m", config)).positions == 131072


@pytest.mark.parametrize(("text", "message"), [(None, "has no config.json"), ("{", "not valid JSON"), ("[]", "object")])
def test_no_model(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match=message) as caught:
        ModelInfo.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_weights_are_those_that_vllm_would_load(tmp_path):
    assert weight_bytes(tmp_path) == 0
    for name, size in {"a.bin": 7, "model-1.safetensors": 3, "model-2.safetensors": 4, "x.json": 9}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 7
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(7))
    assert weight_bytes(tmp_path) == 7
    for path in tmp_path.glob("model-*"):
        path.unlink()
    assert weight_bytes(tmp_path) == 7


def flag(arguments, name):
    return int(arguments[arguments.index(name) + 1])


@pytest.mark.parametrize("memory", [1 * GIB, 8 * GIB, 64 * GIB])
def test_on_a_cpu_the_cache_fits_the_memory_and_holds_a_sequence(tmp_path, memory):
    info = ModelInfo.read(write(tmp_path / "m", LLAMA))
    arguments = vllm.arguments(info, "cpu", memory)
    cache, positions = flag(arguments, "--kv-cache-memory-bytes"), flag(arguments, "--max-model-len")
    assert positions * info.kv_bytes <= cache <= max(memory // 4, plan.KV_LEAST)
    assert 0 < positions <= plan.POSITIONS
    assert "--enforce-eager" in arguments


def test_a_length_is_only_ever_shortened(tmp_path):
    short = ModelInfo.read(write(tmp_path / "m", {**LLAMA, "max_position_embeddings": 2048}))
    assert "--max-model-len" not in vllm.arguments(short, "cpu", 64 * GIB)
    assert "--max-model-len" in vllm.arguments(short, "cpu", GIB // 8)
    bert = ModelInfo.read(write(tmp_path / "b", {"architectures": ["BertModel"], "max_position_embeddings": 512}))
    assert "--max-model-len" not in vllm.arguments(bert, "cpu", GIB)


def test_on_a_gpu_vllm_decides(tmp_path):
    info = ModelInfo.read(write(tmp_path / "m", LLAMA))
    assert vllm.arguments(info, "cuda", GIB) == ["--max-model-len", "auto"]


LOG = [
    ("W1123 torch/_library/triton.py:53] Triton not available", FIRST),
    (
        "(APIServer pid=1) INFO [api_utils.py:286] non-default args: {'model': '/m'}",
        "reading the model's configuration",
    ),
    ("(APIServer pid=1) INFO [model.py:733] Resolved architecture: LlamaForCausalLM", "starting the engine's process"),
    ("(EngineCore pid=2) INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config", "starting the worker"),
    ("(Worker pid=3) INFO [cpu_model_runner.py:68] Starting to load model /m...", "loading weights"),
    ("\rLoading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00]", "loading weights: shard 2 of 4"),
    ("(Worker pid=3) INFO [default_loader.py:501] Loading weights took 0.05 seconds", "preparing memory"),
    ("(EngineCore pid=2) INFO [kv_cache_utils.py:2327] CPU KV cache size: 32,768 tokens", "warming up"),
    (
        "(EngineCore pid=2) INFO [core.py:402] init engine (profile, warmup model) took 0.24 s",
        "starting the API server",
    ),
    ("(APIServer pid=1) INFO [entry.py:140] Starting vLLM server on http://127.0.0.1:1", "starting the API server"),
]


def test_phases_follow_a_real_log():
    phases = Phases()
    assert phases.current == FIRST
    for line, expected in LOG:
        before = phases.current
        assert phases.feed(line + "\n") == ([expected] if expected != before else [])
        assert phases.current == expected


def test_phases_however_the_log_is_cut():
    text = "".join(line + "\n" for line, _ in LOG[:6])
    for step in (1, 7, 1000):
        phases = Phases()
        entered = [phase for at in range(0, len(text), step) for phase in phases.feed(text[at : at + step])]
        assert entered == [expected for _, expected in LOG[1:6]]


def test_a_reserved_port_can_be_listened_on_by_its_owner_to_be(tmp_path):
    with vllm.reserved_port() as port, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.fixture
def side_channel(monkeypatch):
    """A port of the test's own in the place of vLLM's, so that no other test is in the way."""
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        port = sock.getsockname()[1]
    monkeypatch.setattr(vllm, "SIDE_CHANNEL", port)
    return port


def test_side_channels_have_one_port_at_addresses_of_their_own(side_channel):
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(vllm.reserved_side_channel()) for _ in range(3)]
        assert len({host for host, _ in found}) == 3
        assert {port for _, port in found} == {side_channel}, "vLLM hashes it with what it compiles"
        host, port = found[1]
        with zmq.Context() as context, context.socket(zmq.ROUTER) as channel:
            channel.bind(f"tcp://{host}:{port}")  # as vLLM does
    with vllm.reserved_side_channel() as again:
        assert again[1] == side_channel, "and at the next start"


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_real_vllm_hashes_the_port_of_its_side_channel_and_not_the_address():
    """Read, not asked: importing vLLM takes seconds."""
    envs = (Path(find_spec("vllm").submodule_search_locations[0]) / "envs.py").read_text()
    ignored = envs[envs.index("ignored_factors: set[str] = {") :]
    ignored = ignored[: ignored.index("}")]
    assert '"VLLM_NIXL_SIDE_CHANNEL_HOST"' in ignored
    assert '"VLLM_NIXL_SIDE_CHANNEL_PORT"' not in ignored
    assert re.search(rf'"VLLM_NIXL_SIDE_CHANNEL_PORT", "{vllm.SIDE_CHANNEL}"', envs), "its own default"


def test_a_side_channel_gets_another_port_where_somebody_listens_at_all_addresses(side_channel, monkeypatch):
    with socket.socket() as other:
        other.bind(("0.0.0.0", side_channel))
        other.listen()
        with vllm.reserved_side_channel() as (_, port):
            assert port > side_channel
        monkeypatch.setattr(vllm, "SIDE_CHANNELS", 1)
        with pytest.raises(Unavailable, match="free"), vllm.reserved_side_channel():
            pass


def start(children, code):
    child = children.start("vllm", [sys.executable, "-c", code])
    return vllm.Vllm(child, "http://127.0.0.1:9", "org/name")


def test_a_death_at_start_shows_the_last_lines(helios_home):
    with Children(helios_home) as children:
        worker = start(children, "print('line 1\\nValueError: no such dtype', flush=True); raise SystemExit(3)")
        with pytest.raises(Unavailable, match=r"(?s)status 3 .*importing.*ValueError: no such dtype"):
            worker.wait_ready(20, lambda text: None)


def test_the_first_error_is_named_even_far_above_the_end(helios_home):
    code = "print('(Worker) ERROR x.py:1] OSError: [Errno 5] Input/output error'); print('noise\\n' * 99); exit(1)"
    with Children(helios_home) as children:
        worker = start(children, code)
        with pytest.raises(Unavailable, match=r"The first error in it: OSError: \[Errno 5\] Input/output error"):
            worker.wait_ready(20, lambda text: None)


def test_the_deadline_says_what_it_was_doing(helios_home):
    with Children(helios_home) as children:
        worker = start(children, "print('Starting to load model x', flush=True); import time; time.sleep(60)")
        shown = []
        with pytest.raises(DeadlineExceeded, match=r"not ready after 1 s \(it is loading weights\)"):
            worker.wait_ready(1.0, shown.append)
    assert shown == [FIRST, "loading weights"]


@pytest.mark.parametrize(("device", "said", "told"), [("cpu", None, "0"), ("cpu", "1", "1"), ("cuda", None, None)])
def test_on_a_cpu_vllm_saves_no_trace_that_it_could_not_load(tmp_path, monkeypatch, device, said, told):
    monkeypatch.setattr(vllm, "require_vllm", lambda: None)
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    if said is not None:
        monkeypatch.setenv("VLLM_USE_AOT_COMPILE", said)
    info = ModelInfo.read(write(tmp_path / "m", LLAMA))
    started = {}

    class Recording(Children):
        def start(self, name, command, **how):
            started.update(how["env"])
            raise Unavailable("enough")

    with Recording(Home(tmp_path)) as children, pytest.raises(Unavailable, match="enough"):
        vllm.start(children, tmp_path / "m", "org/name", port=1, device=device, info=info)
    assert started.get("VLLM_USE_AOT_COMPILE") == told
