"""benchmarks/domains.py and domain_encoder.py: small, on real texts; their tables say what the records say."""

import json
import sys

import pytest

import launch

RESULTS = launch.ROOT / "benchmarks" / "results"
sys.path.insert(0, str(launch.ROOT / "benchmarks"))
domains = pytest.importorskip("domains")
domain_encoder = pytest.importorskip("domain_encoder")


def run(script: str, *arguments) -> str:
    process = launch.start([sys.executable, f"benchmarks/{script}", "--quick", *map(str, arguments)], cwd=launch.ROOT)
    output = launch.finish(process, 240)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_a_domain_is_prepared_and_learned(shared_data, tmp_path):
    """Once: a second start finds the rows and trains nothing; the page, the pictures and the rows say the same."""
    data, where = shared_data, ("--work", tmp_path / "work", "--results", tmp_path)
    arguments = ("--data", data, *where, "--cases", "small/medical/full/*")
    run("domains.py", *arguments)
    rows = domains.read_rows(tmp_path / "domains.jsonl")
    assert {kind for kind, _ in rows} == {"corpus", "pretraining", "run"}
    medical, general = rows["corpus", "small/medical"], rows["corpus", "small/general"]
    assert medical["rules"]["decontaminate"]["dropped"] > 0  # the same paragraphs stand in many of its documents
    assert medical["tokens"] > general["tokens"] > 0
    for kind in ("plain", "replay"):
        row = rows["run", f"small/medical/full/{kind}"]
        sets = {(one["step"], one["set"]) for one in row["evals"]}
        assert sets >= {(step, name) for step in (0, 1, 2) for name in domains.SETS}
        assert row["points"][-1]["domain_gain"] > 0 and row["points"][0]["general_rise"] == 0
    text = (tmp_path / "domains.md").read_text()
    assert text == domains.page(rows) and f"{medical['tokens']:,}" in text
    for kind in domains.PICTURES:
        picture = tmp_path / "domains" / f"small-medical-{kind}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 60_000
        assert f"(domains/{picture.name})" in text
    said = run("domains.py", *arguments)
    assert said.count("there already") == 2 and len(domains.read_rows(tmp_path / "domains.jsonl")) == len(rows)


def test_held_out_passages_are_in_no_text(shared_data, tmp_path):
    """Texts of all corpora: whole documents are held out, and the others are there."""
    domains.texts.write_texts(shared_data / "corpus", tmp_path, 4)
    for name in (*domains.texts.DOMAINS, "general", "other"):
        held = [json.loads(line)["text"] for line in (tmp_path / f"{name}.held.jsonl").read_text().splitlines()]
        text = (tmp_path / f"{name}.txt").read_text()
        assert len(held) == 4 and all(500 < len(passage) <= domains.texts.PASSAGE for passage in held)
        lines = {line.strip() for line in text.split("\n")}
        missing = [sum(line.strip() not in lines for line in passage.split("\n")) for passage in held]
        assert all(missing), name  # of each passage there are lines that stand nowhere in the text
        assert len(text) > 20 * sum(map(len, held))


@pytest.mark.long  # tests/README.md says why
def test_an_encoder_is_adapted_and_tuned(shared_data, minilm, tmp_path):
    where = ("--work", tmp_path / "work", "--results", tmp_path)
    run("domain_encoder.py", "--data", shared_data, "--model", minilm, *where)
    rows = [json.loads(line) for line in (tmp_path / "domain_encoder.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [
        "adapt",
        *(f"{task}/{start}/1" for task in domain_encoder.METRICS for start in domain_encoder.STARTS),
    ]
    assert rows[0]["after"] < rows[0]["before"]
    text = (tmp_path / "domain_encoder.md").read_text()
    assert text.count("| qtype |") == 2 and text.count("| entities |") == 1


@pytest.mark.parametrize("name", ["domains", "domain_encoder"])
def test_table_is_that_of_the_records(name):
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("nothing is recorded yet")
    module = {"domains": domains, "domain_encoder": domain_encoder}[name]
    assert (RESULTS / f"{name}.md").read_text() == module.page(module.read_rows(path))
