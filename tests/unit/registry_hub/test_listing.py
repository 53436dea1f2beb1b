"""What an upstream lists: checks, and what is left out."""

import pytest

from helios.errors import IntegrityError
from helios.names import RepoId
from registry.pull.listing import RemoteFile, check, choose

REPO = RepoId.parse("org/m")
SHA = "c" * 40


def file(path: str, **kwargs) -> RemoteFile:
    return RemoteFile(**{"path": path, "size": 3, "git_oid": "a" * 40, "sha256": None, **kwargs})


def test_a_sound_listing_passes():
    check(REPO, SHA, [file("a"), file("b/c", sha256="b" * 64, size=0)], "main")
    check(REPO, SHA, [], SHA)


@pytest.mark.parametrize(
    ("commit", "files", "wanted", "says"),
    [
        (None, [file("a")], "main", "None"),
        ("main", [file("a")], "main", "40 hex"),
        (SHA.upper(), [file("a")], "main", "40 hex"),
        (SHA, [file("a")], "d" * 40, "answered with commit"),
        (SHA, [file("../etc/passwd")], "main", "unsafe file"),
        (SHA, [file("/etc/passwd")], "main", "unsafe file"),
        (SHA, [file("a\\b")], "main", "unsafe file"),
        (SHA, [file("a\0b")], "main", "unsafe file"),
        (SHA, [file("a//b")], "main", "unsafe file"),
        (SHA, [file("a"), file("a/b")], "main", "unsafe file"),
        (SHA, [file("a"), file("a")], "main", "twice"),
        (SHA, [file("a", size=-1)], "main", "malformed"),
        (SHA, [file("a", size=1 << 63)], "main", "are the most"),
        (SHA, [file("a", git_oid="zz")], "main", "malformed"),
        (SHA, [file("a", sha256="*" * 64)], "main", "malformed"),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused(commit, files, wanted, says):
    with pytest.raises(IntegrityError, match=says):
        check(REPO, commit, files, wanted)


@pytest.mark.parametrize(
    ("paths", "left_out"),
    [
        (["model.safetensors", "pytorch_model.bin"], {"pytorch_model.bin": "model.safetensors"}),
        (["pytorch_model.bin"], {}),
        (["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"],
         {"unet/diffusion_pytorch_model.bin": "unet/diffusion_pytorch_model.safetensors"}),
        (["model.safetensors", "other/pytorch_model.bin"], {}),
        (["model.safetensors", "training_args.bin", "optimizer.pt"], {}),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin", "pytorch_model.bin"],
         {"pytorch_model.fp16.bin": "model.fp16.safetensors"}),
        (["adapter_model.safetensors", "adapter_model.bin"], {"adapter_model.bin": "adapter_model.safetensors"}),
        (["m.ckpt", "m.safetensors", "m.gguf", "m.onnx"], {"m.ckpt": "m.safetensors"}),
    ],
)  # fmt: skip
def test_pickles_with_a_safetensors_twin_are_left_out(paths, left_out):
    taken, skipped = choose(tuple(map(file, paths)))
    assert skipped == left_out
    assert [f.path for f in taken] == [p for p in paths if p not in left_out]


def test_shards_and_their_index_go_together():
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    safe = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = ["pytorch_model.bin.index.json", "model.safetensors.index.json"]
    taken, skipped = choose(tuple(map(file, [*shards, *safe, *index])))
    assert set(skipped) == {*shards, index[0]}
    assert [f.path for f in taken] == [*safe, index[1]]


def test_the_content_has_a_name_for_its_partial_download():
    assert file("x").key == "git-" + "a" * 40
    assert file("x", sha256="b" * 64).key == "sha256-" + "b" * 64
