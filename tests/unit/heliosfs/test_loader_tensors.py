"""The loader's tensors beside safetensors' own: every type, shards, each kind of memory; and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helios.config import LoaderSettings
from helios.errors import EntryNotFound, InvalidInput, Unavailable
from heliosfs.client.values import TensorInfo
from heliosfs.loader import load as load_module
from heliosfs.loader.load import load_tensors
from heliosfs.loader.shards import choose_files, cut, refuse_file
from heliosfs.loader.sources import DiskFolder, Folder

SETTINGS = LoaderSettings(threads=3, ahead_mib=1, staging_mib=1)
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64,
    "F64": 64, "C64": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and buffers of 4 KiB, 64 KiB of either: a small tensor has several, a small model uses them again."""
    monkeypatch.setattr(load_module, "PART", 4096)
    monkeypatch.setattr(load_module, "MIB", 65536)


def write_raw(path: Path, tensors: Sequence[tuple[str, str, list[int]]]) -> None:
    """A file of tensors given by name, type and shape; every byte of a kind that all types have (0 and 1)."""
    header, offset = {}, 0
    for name, dtype, shape in tensors:
        size = BITS[dtype]
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size // 8]}
        offset += size // 8
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = torch.randint(0, 2, (offset,), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(tensors)))
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data.numpy().tobytes())


def theirs(*paths: Path) -> dict[str, torch.Tensor]:
    out = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


def same(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    raw = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (ours, other)]
    return (ours.dtype, ours.shape) == (other.dtype, other.shape) and torch.equal(*raw)


class Reading:
    """A folder whose files can't be mapped: they are read."""

    way = "the test"

    def __init__(self, folder: Folder) -> None:
        self.name, self.files, self._folder = folder.name, folder.files, folder

    def read(self, path: str) -> bytes:
        return self._folder.read(path)

    def open(self, path: str) -> Any:
        source: Any = self._folder.open(path)
        source.fileno = lambda: None
        return source

    def fetch(self) -> None:
        pass


class LateEvent:
    """A copy that is done when somebody has asked a few times: until then the staging buffer is still being read."""

    def __init__(self, staging: torch.Tensor, memory: torch.Tensor, at: int, nbytes: int, asks: int) -> None:
        self._copy, self._asks, self._lock = (staging, memory, at, nbytes), asks, threading.Lock()
        self.passed = False

    def query(self) -> bool:
        with self._lock:
            self._asks -= 1
            if self._asks <= 0:
                self.finish()
            return self.passed

    def finish(self) -> None:
        if not self.passed:
            staging, memory, at, nbytes = self._copy
            memory[at : at + nbytes] = staging[:nbytes]
            self.passed = True


class LateDevice:
    """A GPU made of host memory whose copies happen late; ``room``: how much memory it has."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room, self.refused, self.events = room, 0, list[LateEvent]()
        self.stagings = 0

    def staging(self, nbytes: int) -> torch.Tensor:
        self.stagings += 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    def view(self, staging: torch.Tensor) -> memoryview:
        return memoryview(staging.numpy())

    def memory(self, nbytes: int) -> torch.Tensor | None:
        if nbytes > self.room:
            self.refused += 1
            return None
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def upload(self, staging: torch.Tensor, memory: torch.Tensor, at: int, nbytes: int) -> LateEvent:
        self.events.append(LateEvent(staging, memory, at, nbytes, asks=3))
        return self.events[-1]

    def hand_over(self, memory: torch.Tensor, events: Sequence[Any]) -> None:
        for event in events:  # the user's stream waits for them
            with event._lock:
                event.finish()


@pytest.fixture(params=["mapped", "read", "device"])
def load(request: pytest.FixtureRequest) -> Any:
    """Loads a directory into each kind of memory."""

    def loaded(directory: Path, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        folder: Any = DiskFolder(directory)
        if request.param == "device":
            return load_tensors(folder, SETTINGS, device=LateDevice(), **options)
        return load_tensors(folder if request.param == "mapped" else Reading(folder), SETTINGS, **options)

    return loaded


def shards(directory: Path, count: int = 3) -> list[Path]:
    """A model of several shards with an index: several types and sizes, empty and scalar tensors."""
    directory.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(3)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    weight_map, paths = {}, []
    for number in range(count):
        tensors = {
            f"layers.{number}.{n}": torch.randn((70 + n, 63), generator=random).to(kinds[n % 4]) for n in range(6)
        }
        tensors |= {f"none.{number}": torch.empty((0, 5)), f"scale.{number}": torch.tensor(number, dtype=torch.int64)}
        paths.append(directory / f"model-{number + 1:05}-of-{count:05}.safetensors")
        save_file(tensors, paths[-1])
        weight_map |= dict.fromkeys(tensors, paths[-1].name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def test_every_type_is_as_safetensors_has_it(tmp_path, load):
    tensors = [(dtype.lower(), dtype, [6, 34]) for dtype in BITS]
    tensors += [("scalar", "F32", []), ("none", "BF16", [0, 7]), ("one", "F4", [2])]
    write_raw(tmp_path / "model.safetensors", tensors)
    ours, other = dict(load(tmp_path)), theirs(tmp_path / "model.safetensors")
    assert set(ours) == set(other) == {name for name, _, _ in tensors}
    assert [name for name in ours if not same(ours[name], other[name])] == []


def test_shards_are_as_safetensors_has_them_and_in_file_order(tmp_path, load):
    paths = shards(tmp_path)
    ours, other = dict(load(tmp_path)), theirs(*paths)
    assert set(ours) == set(other)
    assert [name for name in ours if not same(ours[name], other[name])] == []
    numbers = [int(name.split(".")[1]) for name in ours]
    assert numbers == sorted(numbers)


def test_tensors_that_lie_askew_are_whole(tmp_path, load):
    """One byte before them: no type of more than a byte can be laid over the file's own bytes."""
    tensors = [("odd", "U8", [1]), ("a", "F32", [9]), ("b", "F64", [3]), ("c", "BF16", [5000])]
    write_raw(tmp_path / "model.safetensors", tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    ours = {name: bytes(tensor.cpu().reshape(-1).view(torch.uint8).numpy()) for name, tensor in load(tmp_path)}
    assert b"".join(ours[name] for name, _, _ in tensors) == data


def test_what_the_engine_keeps_stays_as_it_was(tmp_path, load):
    """Tensors may be kept, as models do that put several into one parameter: their memory is used for no others."""
    paths = shards(tmp_path, 6)
    kept, other = list(load(tmp_path)), theirs(*paths)
    assert len(kept) == len(other)
    assert [name for name, tensor in kept if not same(tensor, other[name])] == []


def test_tensors_may_be_written_to_and_the_files_stay_as_they_are(tmp_path, load):
    (path,) = shards(tmp_path, 1)
    before = path.read_bytes()
    for _, tensor in load(tmp_path):
        tensor.copy_(torch.ones_like(tensor))
    assert path.read_bytes() == before


def test_only_what_is_needed_is_delivered(tmp_path, load):
    paths = shards(tmp_path)
    ours, other = dict(load(tmp_path, needed=lambda name: name.endswith(("2", "5")))), theirs(*paths)
    assert set(ours) == {name for name in other if name.endswith(("2", "5"))}
    assert all(same(ours[name], other[name]) for name in ours)


def test_memory_is_used_again_once_its_tensors_are_gone(tmp_path):
    paths = shards(tmp_path, 8)
    seen = set()
    for name, tensor in load_tensors(Reading(DiskFolder(tmp_path)), SETTINGS):
        if tensor.numel():
            seen.add(tensor.untyped_storage().data_ptr())
        assert same(tensor, theirs(*paths)[name])
    assert len(seen) < 8  # each shard is a range, and there are fewer places than shards


def test_staging_buffers_are_not_written_while_the_device_reads_them(tmp_path):
    """Copies happen long after they were begun: a buffer that is filled before would give the wrong bytes."""
    device, paths = LateDevice(), shards(tmp_path, 4)
    ours, other = dict(load_tensors(DiskFolder(tmp_path), SETTINGS, device=device)), theirs(*paths)
    assert [name for name in ours if not same(ours[name], other[name])] == []
    assert len(device.events) > device.stagings  # each buffer was used several times
    assert all(event.passed for event in device.events)  # none is under way when the buffers go


def test_what_a_device_has_no_room_for_comes_in_host_memory(tmp_path):
    write_raw(tmp_path / "model.safetensors", [("large", "F32", [3 << 20]), ("small", "F32", [5])])
    device = LateDevice(room=1 << 20)
    ours, other = dict(load_tensors(DiskFolder(tmp_path), SETTINGS, device=device)), theirs(*tmp_path.iterdir())
    assert device.refused == 1
    assert all(same(ours[name], other[name]) for name in other)
    assert set(ours) == set(other)


@pytest.mark.parametrize("which", [0, 2])
def test_a_truncated_shard_is_refused_before_anything_is_delivered(tmp_path, load, which):
    path = shards(tmp_path)[which]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match=rf"{path.name}: its tensors end at byte \d+ but the file has"):
        next(iter(load(tmp_path)))


@pytest.mark.parametrize("left", [0, 5, 30])
def test_a_shard_without_its_header_is_refused(tmp_path, load, left):
    path = shards(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InvalidInput, match=f"{path.name}.*truncated"):
        next(iter(load(tmp_path)))


def test_a_file_that_becomes_shorter_is_an_error_not_a_crash(tmp_path, load):
    """Its pages are asked for before anybody touches them: no SIGBUS."""
    write_raw(tmp_path / "model.safetensors", [(f"t{n}", "F32", [3 << 20]) for n in range(4)])
    tensors = iter(load(tmp_path))
    next(tensors)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(14 << 20)
    with pytest.raises(Unavailable, match=r"model.safetensors can't be read"):
        list(tensors)


def test_a_missing_shard_is_refused(tmp_path, load):
    shards(tmp_path)[1].unlink()
    with pytest.raises(InvalidInput, match="names files that are not there: model-00002-of-00003"):
        next(iter(load(tmp_path)))


def test_copies_beside_the_shards_are_left_alone_where_an_index_says_so(tmp_path, load):
    paths = shards(tmp_path)
    shutil.copy(paths[0], tmp_path / "consolidated.safetensors")
    assert len(list(load(tmp_path))) == len(theirs(*paths))


def test_the_same_tensor_in_two_files_is_refused(tmp_path, load):
    paths = shards(tmp_path)
    shutil.copy(paths[0], tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InvalidInput, match=r"is in consolidated.safetensors and in model-00001"):
        next(iter(load(tmp_path)))


def test_patterns_choose_files(tmp_path, load):
    paths = shards(tmp_path)
    assert set(dict(load(tmp_path, patterns=["*.none", "*-00002-of-*"]))) == set(theirs(paths[1]))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model-q4.gguf"], "the format of GGUF"),
        (["pytorch_model.bin", "training.pt"], "the format of PyTorch's pickle"),
        (["config.json"], "has no safetensors files$"),
    ],
)
def test_other_formats_are_refused_with_the_reason(tmp_path, files, words):
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(EntryNotFound) as caught:
        choose_files(DiskFolder(tmp_path))
    assert caught.match(words.rstrip("$"))
    assert "--load-format auto" in str(caught.value)


def test_a_gguf_file_is_refused():
    with pytest.raises(InvalidInput, match=r"GGUF(.|\n)*--load-format auto"):
        refuse_file("/models/m-q4.gguf")


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        save_file({f"t{number}": torch.zeros(1)}, tmp_path / f"model-{number}.safetensors")
    assert choose_files(DiskFolder(tmp_path))[0] == [f"model-{n}.safetensors" for n in (1, 9, 10)]


def test_small_neighbours_are_one_range_and_large_tensors_have_their_own():
    mib = 1 << 20
    infos, offset = [], 100
    for name, size in (("a", 10), ("b", 20), ("big", 30 * mib), ("c", 5), ("d", 7 * mib), ("e", 2 * mib)):
        infos.append(TensorInfo(name, "U8", (size,), size, "f", offset))
        offset += size
    ranges = cut(Nothing(), infos)
    assert [[info.name for info in r.tensors] for r in ranges] == [["a", "b"], ["big"], ["c", "d"], ["e"]]
    assert (ranges[0].start, ranges[-1].stop) == (100, offset)
    apart = cut(Nothing(), [infos[0], infos[3]])  # what lies between is not needed, and not read
    assert [r.nbytes for r in apart] == [10, 5]


class Nothing:
    path, size = "f", 0

    def fileno(self) -> int | None:
        return None

    def read_into(self, view: memoryview, offset: int) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(Unavailable, match="none can't be listed"):
        DiskFolder(tmp_path / "none")
