"""What launcher, agent and ranks tell each other arrives as it was told."""

import json
import os
import subprocess
import sys
import time

import pytest

from fastft.launch import agent, protocol


def test_a_beat_is_read_as_it_was_written(tmp_path, monkeypatch):
    path = tmp_path / "rank-0.beat"
    protocol.new_beat(path)
    assert protocol.read_beat(path) == (protocol.UNWATCHED, 0.0)
    monkeypatch.setenv(protocol.HEARTBEAT, str(path))
    fd = protocol.open_beat()
    for step in (0, 7, 2**40, protocol.UNWATCHED):
        protocol.write_beat(fd, step)
        beat = protocol.read_beat(path)
        assert beat.step == step and abs(beat.when - time.time()) < 60
    os.close(fd)
    assert path.stat().st_size == protocol.BEAT.size == 16
    assert agent.BEAT is protocol.BEAT


def test_without_an_agent_nothing_is_told(monkeypatch):
    for name in (protocol.HEARTBEAT, protocol.MISTAKE):
        monkeypatch.delenv(name, raising=False)
    assert protocol.open_beat() is None
    protocol.write_mistake("nobody reads this")


def test_a_mistake_arrives_in_whole(tmp_path, monkeypatch):
    path = tmp_path / "rank-0.mistake"
    assert protocol.read_mistake(path) is None
    monkeypatch.setenv(protocol.MISTAKE, str(path))
    protocol.write_mistake("größer\nthan allowed")
    assert protocol.read_mistake(path) == "größer\nthan allowed"


def test_a_spec_is_one_line():
    spec = protocol.Spec(["train", "a\nb"], 1, 2, 2, 4, "10.0.0.1", 29500, {"A": "ö\n"}, "/logs", 600.0)
    line = spec.to_json()
    assert "\n" not in line and protocol.Spec.from_json(line + "\n") == spec


@pytest.mark.parametrize("line", ["Warning: a host key", "{}", '{"text": "x"}', "[1]", "null", "1", "{", ""])
def test_what_is_no_event_is_passed_on_as_text(line):
    assert protocol.read_event(line) == {"event": "told", "text": line}


def test_events_and_orders_are_lines_of_json():
    line = protocol.event_line("exit", rank=3, code=-9, mistake=None, tail="a\nb")
    assert "\n" not in line
    assert protocol.read_event(line) == {"event": "exit", "rank": 3, "code": -9, "mistake": None, "tail": "a\nb"}
    for order in (protocol.STILL_HERE, protocol.signal_order(15)):
        assert json.loads(json.dumps(order)) == order


def test_only_the_standard_library_is_imported():
    program = (
        "import sys; import fastft.launch.protocol\n"
        "extra = {n.partition('.')[0] for n in sys.modules} - set(sys.stdlib_module_names) - {'fastft'}\n"
        "assert not [n for n in extra if not n.startswith('_')], extra"
    )
    subprocess.run([sys.executable, "-S", "-c", program], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})
