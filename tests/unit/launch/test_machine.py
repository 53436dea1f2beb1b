"""What a machine is read as, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios.errors import Unavailable
from helios.launch.machine import available_memory, find_cores, read_gpus, read_machine
from helios.launch.plan import Gpu

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cores_of_one_node_are_side_by_side_and_siblings_together(tmp_path):
    files = {"node/node0/cpulist": "0,2,4,6\n", "node/node1/cpulist": "1,3,5,7\n"}
    for cpu in range(8):
        files[f"cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}\n"
    system = write(tmp_path, files)
    assert find_cores(range(8), system) == [(0, 4), (2, 6), (1, 5), (3, 7)]
    assert find_cores([0, 1, 4, 6], system) == [(0, 4), (6,), (1,)], "what may not be used is left out"
    assert find_cores([0, 1], tmp_path / "none") == [(0,), (1,)]


def test_a_limit_of_the_cgroup_counts_where_it_is_lower(tmp_path):
    meminfo = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n"
    root = write(tmp_path, {"proc/meminfo": meminfo, "proc/self/cgroup": "4:memory:/x\n0::/pod/vllm\n"})
    assert available_memory(root) == 1000 * 1024
    stat = "anon 100\ninactive_file 300\n"
    write(
        root,
        {
            "sys/fs/cgroup/pod/memory.max": "5000\n",
            "sys/fs/cgroup/pod/memory.current": "4000\n",
            "sys/fs/cgroup/pod/memory.stat": stat,
            "sys/fs/cgroup/pod/vllm/memory.max": "max\n",
        },
    )
    assert available_memory(root) == 5000 - 4000 + 300
    (root / "sys/fs/cgroup/pod/memory.max").write_text("max\n")
    assert available_memory(root) == 1000 * 1024


def test_a_machine_that_does_not_say_its_memory(tmp_path):
    write(tmp_path, {"proc/meminfo": "MemTotal: 1 kB\n", "proc/self/cgroup": ""})
    with pytest.raises(Unavailable, match="does not say"):
        available_memory(tmp_path)


SMI = """0, GPU-aaaa-1, 79000, 81559
1, GPU-bbbb-2, 500, 81559
2, GPU-cccc-3, [N/A], [N/A]
"""


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1]), ("1", [1]), ("0,1", [0, 1]), ("GPU-bbbb", [1]), ("", []), ("7", []), ("-1", [])],
)
def test_gpus_that_cuda_may_see(visible, expected):
    assert [gpu.index for gpu in read_gpus(SMI, visible)] == expected
    assert read_gpus(SMI, "0") == [Gpu(0, 79000 * MIB, 81559 * MIB)]


def test_this_machine():
    machine = read_machine("cpu", {})
    assert machine.cores
    assert machine.memory > 0
    assert not machine.gpus


def test_gpus_are_asked_of_the_driver(tmp_path, monkeypatch):
    smi = write(tmp_path, {"nvidia-smi": "#!/bin/sh\necho '0, GPU-x, 100, 200'\n"}) / "nvidia-smi"
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_machine("cuda", {}).gpus == [Gpu(0, 100 * MIB, 200 * MIB)]
    with pytest.raises(Unavailable, match="no GPU may be used"):
        read_machine("cuda", {"CUDA_VISIBLE_DEVICES": ""})
    smi.write_text("#!/bin/sh\necho 'driver mismatch' >&2\nexit 9\n")
    with pytest.raises(Unavailable, match="driver mismatch"):
        read_machine("cuda", {})
