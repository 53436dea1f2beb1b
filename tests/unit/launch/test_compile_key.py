"""The key of compiled kernels: what changes code changes it, nothing else does."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.launch.compile_key import (
    SAME_CODE,
    DeviceFacts,
    Engine,
    cache_key,
    compiled_arguments,
    compiles,
    cpu_flags,
    this_device,
    this_engine,
)
from helios.names import check_ref

ENGINE = Engine("vllm", "0.32.0", (("torch", "2.13.0"),), "3.11.9", "/opt/venv")
DEVICE = DeviceFacts("cuda", ("H200, 9.0, 570.1",))
ARGUMENTS = ["--max-model-len", "1024", "--dtype=bfloat16", "--port", "1"]


def key(manifest="a" * 64, engine=ENGINE, device=DEVICE, arguments=ARGUMENTS, environ=None, seal="s"):
    return cache_key(manifest, engine, device, arguments, environ or {}, seal)


@pytest.mark.parametrize(
    "other",
    [
        key(manifest="b" * 64),
        key(engine=dataclasses.replace(ENGINE, version="0.33.0")),
        key(engine=dataclasses.replace(ENGINE, packages=(("torch", "2.14.0"),))),
        key(engine=dataclasses.replace(ENGINE, packages=(*ENGINE.packages, ("triton", "3.5")))),
        key(engine=dataclasses.replace(ENGINE, prefix="/elsewhere")),
        key(device=DeviceFacts("cuda", ("L4, 8.9, 570.1",))),
        key(device=DeviceFacts("cpu", DEVICE.capability)),
        key(arguments=["--max-model-len", "2048", "--dtype=bfloat16"]),
        key(arguments=[*ARGUMENTS, "--enable-lora"]),
        key(arguments=[*ARGUMENTS, "-O3"]),
        key(arguments=[*ARGUMENTS, "-tp", "2"]),
        key(environ={"VLLM_USE_AOT_COMPILE": "0"}),
        key(seal="t"),
    ],
)
def test_what_changes_code_changes_the_key(other):
    assert other.name != key().name


@pytest.mark.parametrize(
    "same",
    [
        key(arguments=["--dtype", "bfloat16", "--max-model-len=1024"]),
        key(arguments=["--max-model-len", "8", "--max-model-len", "1024", "--dtype", "bfloat16"]),
        key(arguments=[*ARGUMENTS, "--served-model-name", "a", "b", "--api-key", "secret"]),
        key(environ={"VLLM_NIXL_SIDE_CHANNEL_PORT": "5601", "PATH": "/bin", "HOME": "/root"}),
    ],
)
def test_what_changes_no_code_does_not(same):
    assert same == key()


def test_secrets_are_not_among_the_facts_which_are_published():
    made = key(
        arguments=["--api-key", "hunter2", "--hf-token=hunter2"],
        environ={"VLLM_API_KEY": "hunter2", "VLLM_S3_SECRET": "hunter2", "TORCH_HUB_TOKEN": "hunter2"},
    )
    assert "hunter2" not in made.facts
    json.loads(made.facts)


@given(st.permutations([["--dtype", "auto"], ["--enable-lora"], ["--max-model-len", "9"], ["--port", "3"]]))
def test_the_order_of_arguments_is_none_of_the_key(shuffled):
    flat = [word for words in shuffled for word in words]
    assert compiled_arguments(flat) == [["--dtype", "auto"], ["--enable-lora"], ["--max-model-len", "9"]]


@given(st.sampled_from(sorted(SAME_CODE)), st.text(st.characters(codec="ascii", exclude_characters="-"), max_size=9))
def test_any_value_of_an_argument_without_code_is_left_out(name, value):
    assert compiled_arguments([name, value]) == compiled_arguments([f"{name}={value}"]) == []


def test_the_ref_is_one():
    assert check_ref(key().ref).startswith("refs/helios/compile/")


def test_an_eager_engine_on_a_cpu_compiles_nothing():
    assert not compiles("cpu", ["--enforce-eager"])
    assert compiles("cpu", [])
    assert compiles("cpu", ["--enforce-eager", "--no-enforce-eager"])  # what a user adds comes last, and wins
    assert compiles("cuda", ["--enforce-eager"])  # kernels of Triton and FlashInfer


def test_flags_of_the_first_processor():
    assert cpu_flags("processor : 0\nflags\t\t: sse avx2\n\nprocessor : 1\nflags : sse\n") == ("avx2", "sse")
    assert cpu_flags("Features : asimd fp\n") == ("asimd", "fp")
    assert cpu_flags("") == ()


def test_this_machine_has_facts():
    assert this_device("cpu").capability
    assert dict(this_engine("msgspec").packages).keys() <= {"torch", "triton", "triton-cpu", "flashinfer-python"} | {
        "flashinfer-jit-cache"
    }
