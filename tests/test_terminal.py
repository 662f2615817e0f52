"""What people see: tables and progress on terminals of two widths, logs, and the answer to Ctrl-C."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from rich.console import Console

import launch
from fastft import terminal

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert):
    """A configuration, and the folder of the run that it made: 4 classes that end in numbers."""
    folder = tmp_path_factory.mktemp("terminal")
    rows = [f"{word} number {i},{word}" for i in range(6) for word in ("apple", "bear", "cloud", "dune")]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(folder / "rows.csv"), "eval": {"test": str(folder / "rows.csv")}, "max_length": 16},
        "batch": {"size": 4},
        "train": {"steps": 6, "log_every": 3},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
    path = launch.write_config(folder / "c.yaml", config)
    launch.fastft("train", path)
    return path, folder / "run"


def lines_of(output: str) -> list[str]:
    """What was written, without colors, as lines; what a bar drew over is a line of its own."""
    return re.split(r"[\r\n]", CONTROL.sub("", output))


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("verb", ["validate", "plan", "doctor", "predict", "train"])
def test_nothing_is_cut(run, tmp_path, verb, width):
    path, folder = run
    arguments = {
        "validate": [path],
        "plan": ["--params", "7e9", "--tokens", "1e12"],
        "doctor": [],
        "predict": [folder, "--text", "apple number 3"],
        "train": [path, f"run.dir={tmp_path / 'run'}"],
    }[verb]
    code, output = launch.on_terminal(width, verb, *arguments)
    lines = lines_of(output)
    assert code == 0, output
    assert not [line for line in lines if "…" in line]
    drawn = [line for line in lines if re.search(r"[┃│]", line) or "ETA" in line]
    assert all(len(line) <= width for line in drawn)
    wanted = {
        "validate": [r"\brows\b.*\b24\b", r"24"] if width == 80 else [r"train +│ 24 +│"],
        "plan": [r"125\.7", r"tokens/s"],
        "doctor": [r"Self-check", r"adamw .* pass\b"],
        "predict": [r'"label": "\w+"'],
        "train": [r"step 3/6  loss \d\.\d{4}  lr [\d.e-]+  [\d,]+ tokens/s  \d\.\d\d GB", r"step \d/6 .* ETA"],
    }[verb]
    for pattern in wanted:
        assert any(re.search(pattern, line) for line in lines), (pattern, output[-3000:])


def test_the_bar_lives_before_the_first_step_ends(run, tmp_path):
    """A step of a few seconds: the seconds are counted while it lasts."""
    slow = ["batch.size=1500", "batch.micro=1", "train.steps=1", "train.epochs=null"]
    config = yaml.safe_load(run[0].read_text())
    text = "\n".join(["text,label"] + [f"word {i},{'ab'[i % 2]}" for i in range(1500)])
    (tmp_path / "many.csv").write_text(text + "\n")
    config["data"] |= {"train": str(tmp_path / "many.csv"), "eval": {}}
    config["run"]["dir"] = str(tmp_path / "run")
    path = launch.write_config(tmp_path / "c.yaml", config)
    code, output = launch.on_terminal(80, "train", path, *slow)
    shown = [line for line in lines_of(output) if "first step:" in line]
    assert code == 0 and len({re.search(r"first step: (\d+) s so far", line)[1] for line in shown}) >= 2, output


def test_a_log_has_no_control_characters(run, tmp_path):
    _, output = launch.fastft("train", run[0], f"run.dir={tmp_path / 'run'}")
    assert "step 3/6  loss" in output and not re.search(r"[\x00-\x08\x0b-\x1f]", output)
    assert not [line for line in output.splitlines() if "…" in line]


@pytest.mark.parametrize(
    "width, form", [(60, "a row a line"), (50, "without rules"), (30, "a column a row"), (20, "a line a cell")]
)
def test_the_form_that_fits(width, form):
    out = Console(file=io.StringIO(), width=width)
    columns = ("set", "truncated", "sequences", "longest", "tokens")
    terminal.print_table(out, columns, [["[b]dev[/b]", "0", "1,234,567", "99", "98,765,432"]])
    text = out.file.getvalue()
    assert "1,234,567" in text and "98,765,432" in text
    first = {
        "a row a line": "┃ set ┃ truncated ┃",
        "without rules": "set  truncated",
        "a column a row": "┃ set       ┃ dev",
        "a line a cell": "set        dev",
    }
    assert first[form] in text and max(map(len, text.splitlines())) <= max(width, 21), text


def test_text_is_folded_where_that_helps():
    out = Console(file=io.StringIO(), width=40)
    terminal.print_table(out, ("op", "error"), [["adamw", "no kernel for this device was built " * 3]], text=("error",))
    assert "adamw" in out.file.getvalue() and max(map(len, out.file.getvalue().splitlines())) <= 40


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_acknowledged_and_saves(run, tmp_path):
    arguments = ["train", run[0], f"run.dir={tmp_path / 'run'}", "train.steps=100000", "train.log_every=1"]
    process = launch.start_python(["-m", "fastft", *arguments], {})
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    output = launch.finish(process, 60)
    asked = output.index("SIGINT: stopping after this step and saving; again: end now")
    assert process.returncode == 130 and output.index("SIGINT: saved at step") > asked
    assert "Traceback" not in output and f"fastft resume {tmp_path / 'run'}" in output


@pytest.mark.parametrize("seconds", [0.3, 1.2])
def test_ctrl_c_while_importing(run, tmp_path, seconds):
    command = [sys.executable, "-m", "fastft", "train", str(run[0]), f"run.dir={tmp_path / 'run'}"]
    for wait in (seconds, 2 * seconds, 4 * seconds, 8 * seconds):
        process = subprocess.Popen(command, env=launch.ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        if process.returncode == 130 or ("KeyboardInterrupt" not in said and said):  # else Python itself was not up yet
            break
    assert said == "interrupted\n" and process.returncode == 130
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_a_verb(run, monkeypatch, capfd):
    """Past the imports, in whatever a verb does."""
    from fastft.cli import main
    from fastft.cli.verbs import validate

    def interrupted(config: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(validate, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(run[0])])
    assert ended.value.code == 130 and capfd.readouterr().err == "interrupted\n"
