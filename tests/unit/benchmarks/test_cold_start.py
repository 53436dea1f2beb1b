"""What the benchmark of cold starts makes of what it reads."""

from __future__ import annotations

import subprocess
import time

from benchmarks.cold_start import LISTENS, Started, began, followed, said
from helios.launch.phases import FIRST

LINES = (
    "non-default args: {}\n",
    "Resolved architecture: LlamaForCausalLM\n",
    "Loading safetensors checkpoint shards: 50% | 1/2\rLoading safetensors checkpoint shards: 100% | 2/2\n",
    "Loading weights took 0.25 seconds\n",
    f"INFO: {LISTENS}.\n",
)


def test_phases_fill_the_time_until_vllm_listens_and_shards_are_one():
    started = Started([("a", 12.0), ("loading weights", 15.0), ("loading weights: shard 1 of 2", 16.0)], 20.0)
    found = started.seconds(10.0)
    assert found == {FIRST: 2.0, "a": 3.0, "loading weights": 5.0}
    assert sum(found.values()) == 10.0


def test_a_log_is_followed_from_before_it_is_there(tmp_path, wait_for):
    log, begin = tmp_path / "vllm.log", time.time()
    with followed(log) as started:
        for line in LINES:
            with log.open("a") as file:
                file.write(line)
            time.sleep(0.02)
        wait_for(lambda: started.listens, what="the last line")
    assert begin < started.phases[0][1] <= started.phases[-1][1] <= started.listens <= time.time()
    assert started.phases[0][0] == "reading the model's configuration"
    assert started.weights_s == 0.25


def test_only_what_is_said_from_now_on_counts(tmp_path, wait_for):
    log = tmp_path / "serve.log"
    log.write_text("one answers.\n")
    with said(log, " answers.", "is being started.") as found:
        time.sleep(0.05)
        assert found == {}
        with log.open("a") as file:
            file.write("two is being started.\n")
        wait_for(lambda: found, what="what was said")
        assert list(found) == ["is being started."]


def test_when_a_process_began():
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        after = time.time()
        try:
            assert before - 0.05 < began(process.pid) < after + 0.05, "/proc counts in hundredths of a second"
        finally:
            process.kill()
