"""benchmarks/tasks.py: its cases' rows, and its table, which says what the records say."""

import json
import sys
from pathlib import Path

import pytest

import launch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
tasks = pytest.importorskip("tasks")


def test_rows_are_taken_at_even_distances(shared_data, tmp_path):
    for name, case in tasks.CASES.items():
        found = tasks.write_rows(case, shared_data, tmp_path, quick=False)
        rows = [json.loads(line) for line in Path(found["dev"]).read_text().splitlines()]
        total = found["dev_total"]
        assert len(rows) == case.kept[1] < total, name
        everything = case.rows(shared_data, "dev")
        assert rows[-1] == everything[int((len(rows) - 1) * total / len(rows))]
        assert set(case.columns.values()) <= set(rows[0])


def test_table_is_that_of_the_records():
    table = launch.ROOT / "benchmarks" / "results" / "tasks.md"
    if not table.exists():
        pytest.skip("nothing is recorded yet")
    assert table.read_text() == tasks.markdown()
