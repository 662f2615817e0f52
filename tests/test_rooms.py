"""A member of each table is one file that nothing else names: files put beside the library's work as they do."""

import contextlib
import importlib
import json
from pathlib import Path

import pytest

import launch
from fastft import config as configuration
from fastft import rooms, track
from fastft.errors import UserError
from fastft.registry import Registry

MEMBERS = {
    "fastft.data.orders": (
        "backwards",
        """
        import numpy as np

        from fastft import rooms
        from fastft.data.orders.base import Order, Samples


        @rooms.ORDERS.register("backwards")
        class Backwards(Order):
            '''The last row first.'''

            def samples(self, start, stop):
                n = len(self.split)
                return Samples(n - 1 - np.arange(start, stop) % n, np.arange(start, stop) // n)
        """,
    ),
    "fastft.objectives": (
        "scaled",
        """
        from pydantic import Field

        from fastft import rooms
        from fastft.config import Section
        from fastft.objectives.base import Wrapper


        class ScaledSettings(Section):
            scalar = "by"
            by: float = Field(2.0, description="Factor of the loss.")


        @rooms.OBJECTIVES.register("scaled")
        class Scaled(Wrapper):
            '''The loss times a factor.'''

            Settings = ScaledSettings

            def compute_loss(self, model, batch, scale):
                return self.settings.by * self.inner.compute_loss(model, batch, scale)
        """,
    ),
    "fastft.train.observers": (
        "patient",
        """
        from pydantic import Field

        from fastft import rooms
        from fastft.config import Section
        from fastft.train.observers.base import Evaluate, Observer, Save, Stop


        class PatientSettings(Section):
            steps: int = Field(3, description="Stop after so many.")


        @rooms.OBSERVERS.register("patient")
        class Patient(Observer):
            '''Has the second step evaluated and saved, and ends the run after some.'''

            Settings = PatientSettings

            def after_step(self, result):
                asked = [Evaluate(), Save()] if result.step == 2 else []
                return [*asked, *([Stop("enough")] if result.step == self.settings.steps else [])]
        """,
    ),
    "fastft.track": (
        "lines",
        """
        from fastft import rooms
        from fastft.track.base import Tracker


        @rooms.TRACKERS.register("lines")
        class Lines(Tracker):
            '''Kinds of records, a line each.'''

            def open(self, folder, config):
                self.file = open(folder / "lines.txt", "a")

            def record(self, record):
                self.file.write(record.kind + "\\n")

            def close(self):
                self.file.close()
        """,
    ),
}


@contextlib.contextmanager
def members(folder: Path):
    """Files in folders that are looked at beside the library's own; yields the code that does the same in a process."""
    import textwrap

    lines, added = ["import importlib"], []
    for package, (name, code) in MEMBERS.items():
        home = folder / package
        home.mkdir()
        (home / f"{name}.py").write_text(textwrap.dedent(code).lstrip())
        importlib.import_module(package).__path__.append(str(home))
        added.append((package, str(home)))
        lines.append(f"importlib.import_module({package!r}).__path__.append({str(home)!r})")
    try:
        yield "\n".join(lines)
    finally:
        for package, home in added:
            importlib.import_module(package).__path__.remove(home)


def test_a_member_is_one_file(lm_config, tmp_path):
    lm_config["data"]["order"] = "backwards"
    lm_config["loss"] = {"scaled": 3.0}
    lm_config["train"] = {"steps": 9, "log_every": 1, "patient": {"steps": 4}}
    lm_config["run"]["trackers"] = "lines"
    with members(tmp_path) as paths:
        assert "backwards" in rooms.ORDERS.names()
        config = launch.write_config(tmp_path / "c.yaml", lm_config)
        assert configuration.load(config).train.patient.steps == 4
        with pytest.raises(UserError, match=r"loss\.scaled\.bye: unknown key"):
            configuration.validate({**lm_config, "loss": {"scaled": {"bye": 1}}})
        script = tmp_path / "train.py"
        script.write_text(f"{paths}\nfrom fastft.cli.main import main\nmain(['train', {str(config)!r}])\n")
        launch.ranks(1, [script])
    records = track.read(tmp_path / "run")
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in {r["kind"] for r in records}}
    assert [r["step"] for r in by_kind["train"]] == [1, 2, 3, 4] and by_kind["end"][0]["stopped"] == "enough"
    assert 2 in [r["step"] for r in by_kind["eval"]] and [r["step"] for r in by_kind["checkpoint"]] == [2, 4]
    assert (tmp_path / "run" / "lines.txt").read_text().split() == [r["kind"] for r in records]
    plain = json.loads(json.dumps(lm_config))
    plain["train"], plain["loss"] = {"steps": 1, "log_every": 1}, {}
    plain["data"]["order"], plain["run"] = (
        "permutation",
        {**plain["run"], "dir": str(tmp_path / "plain"), "trackers": []},
    )
    launch.fastft("train", launch.write_config(tmp_path / "plain.yaml", plain))
    first = track.read(tmp_path / "plain")[2]["loss"]
    assert by_kind["train"][0]["loss"] > 2 * first  # three times as large, of other rows


def test_a_verb_is_one_file(tmp_path, capsys):
    cli = importlib.import_module("fastft.cli.main")

    (tmp_path / "greet.py").write_text(
        '"""Says hello."""\n\n\ndef run(name: str) -> None:\n    print(f"hello {name}")\n'
    )
    importlib.import_module("fastft.cli.verbs").__path__.append(str(tmp_path))
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(["greet", "you"])
        assert end.value.code == 0 and "hello you" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        assert "greet          Says hello." in capsys.readouterr().out
    finally:
        importlib.import_module("fastft.cli.verbs").__path__.remove(str(tmp_path))


def test_names_that_are_wrong_or_taken():
    table: Registry = Registry("thing")
    table.register("one")(1)
    with pytest.raises(RuntimeError, match="registered twice"):
        table.register("one")(2)
    with pytest.raises(UserError, match=r"Unknown thing 'onne'\.\nDid you mean 'one'"):
        table.get("onne")
