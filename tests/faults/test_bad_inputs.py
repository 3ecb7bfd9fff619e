"""Bad inputs to every script: each ends with the expected status and a sentence, and harms nothing finished.

Of each group of rows, the same fault in several places or for several scripts, ./test.sh runs the first one;
`pytest tests/faults --all-faults` runs all. Where status 2 is expected there has to be exactly one sentence;
nowhere a traceback, or a file of other bytes than before.
"""

from __future__ import annotations

import json

from csad.data.files import write_image
from csad.data.images import read_rgb

import pytest

from benchmarks.faults import contents, copy, run
from faults import data, options, results, runs
from faults.pictures import encodings
from faults.row import Row

TABLE = [group for module in (results, data, options, runs) for group in module.GROUPS]


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        each = slice(None if metafunc.config.getoption("--all-faults") else 1)
        table = [row for group in TABLE for row in group[each]]
        metafunc.parametrize("row", table, ids=[f"{row.name}: {row.command}" for row in table])


@pytest.fixture
def lab(finished):
    """A copy of the finished run, which stays until the next test."""
    folder = finished.folder.with_name("lab")
    copy(finished.folder, folder)
    return folder


def test_a_bad_input_gets_a_sentence_and_harms_nothing(row: Row, finished, lab):
    for prepare in row.prepared:
        prepare(lab)
    before = contents(lab) if row.prepared else finished.files
    ended = run(row.command, lab, row.inside)
    assert ended.status == row.status, ended
    assert row.said in ended.out + ended.err
    assert "Traceback" not in ended.out + ended.err
    if row.status == 2:
        assert len([line for line in ended.err.splitlines() if "error: " in line]) == 1, ended.err
    after = contents(lab)
    harmed = [name for name, content in before.items() if after.get(name) != content]
    assert [name for name in harmed if not name.startswith(row.rewrites) and "_progress." not in name] == []
    for log in lab.glob("*/predictions.jsonl"):
        for line in log.read_text().splitlines():
            json.loads(line, parse_constant=lambda number, name=log.name: pytest.fail(f"{number} in {name}"))


def test_a_picture_has_one_score_in_every_encoding_or_is_refused(lab):
    photos = lab / "photos"
    listed = encodings(read_rgb(photos / "000.png"))
    for path in photos.iterdir():
        path.unlink()
    for name, content, seen in listed:
        (photos / name).write_bytes(content)
        if not isinstance(seen, str):
            write_image(photos / f"{name}.plain.png", seen)
    ended = run("predict photos --batch_size 1", lab)
    lines = [json.loads(line) for line in (lab / "new/predictions.jsonl").read_text().splitlines()]
    scores = {line["image"].removeprefix("photos/"): line["score"] for line in lines}
    said = {name: [line for line in ended.out.splitlines() if name in line] for name, _, _ in listed}
    for name, _, seen in listed:
        if isinstance(seen, str):
            assert scores.get(name) is None and any(seen in line for line in said[name]), (name, said[name])
        else:
            assert scores[name] == scores[f"{name}.plain.png"] is not None, (name, said[name])
