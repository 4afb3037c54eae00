"""The report without a browser: what is read, thinned, said and escaped, and what it says of files that are wrong."""

from __future__ import annotations

import builtins
import json
import math
import re
import sys

import pytest
from report_cases import EVIL, layer, line, run_with_everything, write

from dmoe.report.__main__ import main
from dmoe.report.columns import MOST_COLUMNS, columns_of
from dmoe.report.page import load_bytes
from dmoe.report.reading import RunError, read_run
from dmoe.report.specialisation import names_of, preferred
from dmoe.report.words import findings, in_bytes, seconds, summary


def test_a_column_is_the_mean_of_its_steps(tmp_path):
    """A thousand steps in columns of three; the last has one."""
    lines = [
        line(
            step,
            {"a": layer([step % 7, 5, 9, 2], entropy=math.log(4) * (step % 10) / 10, seconds={"router": step / 1000})},
            seconds=step / 10,
            parts={"forward": 1.0} if step % 2 else {},
        )
        for step in range(1000)
    ]
    columns = columns_of(read_run(write(tmp_path, lines)))
    assert len(columns.steps) == 334 <= MOST_COLUMNS
    assert columns.steps[:2] == [(0, 2), (3, 5)]
    assert columns.steps[-1] == (999, 999)
    a = columns.layers["a"]
    for place, (first, last) in enumerate(columns.steps):
        steps = range(first, last + 1)
        counts = [sum(step % 7 for step in steps), *(each * len(steps) for each in (5, 9, 2))]
        assert a.load[place] == pytest.approx([4 * count / sum(counts) for count in counts])
        assert a.peak[place] == max(a.load[place])
        assert a.curves["entropy"][place] == pytest.approx(sum(step % 10 / 10 for step in steps) / len(steps))
        assert a.curves["dead_experts"][place] == sum(step % 7 == 0 for step in steps) / len(steps)
        assert a.seconds["router"][place] == pytest.approx(sum(step / 1000 for step in steps) / len(steps))
        assert columns.parts["forward"][place] == (1.0 if any(step % 2 for step in steps) else None)


def test_bytes_of_a_heat_map(tmp_path):
    lines = [line(0, {"a": layer([0, 1, 9, 10])}), line(1, {}), line(2, {"a": layer([100, 100, 100, 100])})]
    lines.append(line(3, {"a": layer([1, 0, 100000, 0])}))
    columns = columns_of(read_run(write(tmp_path, lines)))
    rows = [load_bytes(columns.layers["a"])[4 * expert : 4 * expert + 4] for expert in range(4)]
    assert [row[1] for row in rows] == [255] * 4
    assert [row[2] for row in rows] == [127] * 4  # even
    assert [row[3] for row in rows] == [1, 0, 211, 0]  # at most an eighth; none; four times
    assert rows[0][0] == 0
    for row, times in zip(rows[1:], (0.2, 1.8, 2.0), strict=True):
        assert 2 ** ((row[0] - 1) / 252 * 6 - 3) == pytest.approx(times, rel=0.01)


def test_of_two_lines_about_a_step_the_later_holds(tmp_path):
    lines = [line(step, {"a": layer([1, 1, 1, 1])}, warnings=[f"old {step}"]) for step in range(4)]
    lines += [line(step, {"a": layer([3, 1, 0, 0])}, warnings=[f"new {step}"]) for step in (2, 3, 4)]
    run = read_run(write(tmp_path, lines))
    assert [number for number, _ in run.steps()] == [0, 1, 2, 3, 4]
    assert run.warnings == [(0, "old 0"), (1, "old 1"), (2, "new 2"), (3, "new 3"), (4, "new 4")]
    assert columns_of(run).layers["a"].peak == [1, 1, 3, 3, 3]


WRONG = {
    "no JSON": "{",
    "an array": "[1]",
    "a number": "7",
    "no step": json.dumps({"kind": "step", "layers": {}}),
    "a step that is none": json.dumps(line(-1, {})),
    "a step that is true": json.dumps(line(True, {})),
    "layers in a list": json.dumps(line(0, [])),
    "a layer without counts": json.dumps(line(0, {"a": {"entropy": 1.0}})),
    "counts that are none": json.dumps(line(0, {"a": layer([1, "2"])})),
    "no experts": json.dumps(line(0, {"a": {"tokens_per_expert": []}})),
    "more kept than experts": json.dumps(line(0, {"a": layer([1, 2], kept_per_expert=[1])})),
    "NaN": json.dumps(line(0, {"a": layer([1, 2])}, seconds=math.nan)),
    "text for a number": json.dumps(line(0, {"a": layer([1, 2], router_logits_rms="big")})),
    "warnings of numbers": json.dumps(line(0, {}, warnings=[3])),
    "a run without layers": json.dumps({"kind": "run"}),
    "deep": "[" * 100_000,
    "no text": "\udcff",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_malformed_lines_are_named_and_left_out(tmp_path, wrong, capsys):
    write(tmp_path, [line(0, {"a": layer([1, 1])})])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(wrong.encode(errors="surrogateescape") + b"\n")
        file.write(json.dumps(line(7, {"a": layer([1, 3])})).encode() + b"\n")
    assert main([str(tmp_path)]) == 0
    told = "Line 3 is no record of a run, and left out."
    assert told in capsys.readouterr().err
    assert told in (tmp_path / "report.html").read_text()
    assert sorted(read_run(tmp_path).lines) == [0, 7]


def test_half_a_last_line_is_a_note_and_many_wrong_ones_are_one_sentence(tmp_path):
    write(tmp_path, [line(0, {"a": layer([1, 1])})], end='\n{"kind":"st')
    assert read_run(tmp_path).notes == [
        "The last line (3) is half a line, which a run leaves that is killed: left out."
    ]
    write(tmp_path, [line(0, {})], end="\n" + "{\n" * 30)
    (note,) = read_run(tmp_path).notes
    assert note.startswith("30 lines (3, 4, 5, ")
    assert note.endswith("22, ...) are no record of a run, and left out.")


def test_lines_of_a_later_kind_are_passed_over(tmp_path):
    write(tmp_path, [{"kind": "another"}, line(0, {})])
    assert not read_run(tmp_path).notes


def test_the_page_is_one_file_whose_names_are_escaped(tmp_path):
    run_with_everything(tmp_path / "<b>run", names=(EVIL, "</script><script>alert(1)</script>", "<!--"))
    assert main([str(tmp_path / "<b>run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<title>&lt;b&gt;run" in page
    assert EVIL not in page
    assert "alert(1)</script>" not in page
    assert "<!--" not in page
    assert page.count("<script") == 2
    program = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(
        r"""(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", program.replace("src=x", "")
    )
    assert "default-src 'none'" in page


def test_words(tmp_path):
    run = read_run(run_with_everything(tmp_path))
    columns = columns_of(run)
    assert summary(run, columns) == (
        "30 recorded steps, 0 to 290, of 3 layers with 4 experts each, of which a token takes 2, on 2 ranks."
    )
    said = {each.title: each for each in findings(columns)}
    assert said["Dead experts"].text == "had no token in the last tenth of the run, in blocks.2."
    assert said["Dead experts"].fine is False
    assert said["Dropped"].value == f"{(2 * 2 + 10) / 3 / 128:.1%}"
    assert "most in blocks.2, 7.8%" in said["Dropped"].text
    assert said["Time"].text == (
        "a step; the mixtures' forwards are 60% of it: router 10%, dispatch 20%, experts 50%, combine 20%."
    )
    assert said["Router logits"].value == "1.5"
    assert (in_bytes(17), in_bytes(3 * 1024**2), in_bytes(2**53)) == ("17 B", "3 MiB", "8.19e+03 TiB")
    assert (seconds(2), seconds(0.0251), seconds(1e-5)) == ("2 s", "25.1 ms", "10 µs")


def test_healthy_and_small_runs_are_fine(tmp_path):
    names = ("a", "b")
    even = [line(step, {name: layer([16, 16, 16, 16]) for name in names}) for step in range(5)]
    columns = columns_of(read_run(write(tmp_path, even, names)))
    said = {each.title: (each.value, each.fine) for each in findings(columns)}
    assert said == {
        "Busiest experts": ("1.0 times even", True),
        "Entropy": ("50%", None),
        "Dead experts": ("none", True),
        "Dropped": ("nothing", True),
        "Step": ("500 ms", None),
    }


def test_preferred_tokens_are_those_of_a_loop():
    counts = [[90, 1, 10, 2], [4, 80, 10, 2], [3, 5, 10, 0], [3, 14, 10, 0]]
    first, second, third, fourth = preferred(counts)
    assert first == [(0, 3.6, 90)]  # the last token is preferred, too, but two counts say little
    assert second == [(1, 3.2, 80)]
    assert third == fourth == []
    many = preferred([[10 + place for place in range(20)], [1] * 20])
    assert [place for place, _, _ in many[0]] == list(range(19, 11, -1))


def test_names_of_tokens(tmp_path):
    file = tmp_path / "names.json"
    for content in (["a", "b"], {"0": "a", "1": "b"}, {"a": 0, "b": 1}):
        file.write_text(json.dumps(content))
        assert names_of(str(file), None) == {0: "a", 1: "b"}
    assert names_of(None, None) == {}
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"x": 0, "y": 3}, unk_token="x")
    tokenizers.Tokenizer(model).save(str(file))
    assert names_of(None, str(file)) == {0: "x", 3: "y"}


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("7", ["--tokens", "FILE"], "--tokens: expected a list of names, or names by id or ids by name, got int"),
        ('{"a": []}', ["--tokens", "FILE"], "--tokens: expected a list of names"),
        ("{", ["--tokens", "FILE"], "--tokens: expected a JSON file, got"),
        (None, ["--tokens", "FILE"], "--tokens: expected a JSON file, got"),
        ("{}", ["--tokenizer", "FILE"], "--tokenizer: expected a tokenizer.json, got"),
        (None, ["--out", "FILE/in/a/folder.html"], "--out: expected a file that can be written, got"),
    ],
)
def test_bad_options_get_a_sentence(tmp_path, capsys, content, options, words):
    write(tmp_path / "run", [line(0, {})])
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    assert main([str(tmp_path / "run"), *(each.replace("FILE", str(file)) for each in options)]) == 2
    told = capsys.readouterr().err
    assert f"dmoe.report: {words}" in told
    assert told.count("\n") == 1


def test_folders_without_a_run_get_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "RUN: expected a folder with metrics.jsonl, which dmoe.monitor writes, got" in capsys.readouterr().err
    write(tmp_path, [])
    with pytest.raises(RunError, match="expected at least one recorded step, got none in 1 lines"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="got none in 0 lines"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"ids": [1], "layers": {"a": [[1, 2]]}}', '{"ids": 1, "layers": {}}'])
def test_a_table_of_tokens_that_is_none_is_left_out(tmp_path, content):
    write(tmp_path, [line(0, {"a": layer([1, 1])})])
    (tmp_path / "tokens.json").write_text(content)
    run = read_run(tmp_path)
    assert run.tokens is None
    assert run.notes == ["tokens.json is no table of tokens, and left out."]


def test_pictures(tmp_path, capsys):
    run_with_everything(tmp_path, steps=4)
    assert main([str(tmp_path), "--png"]) == 0
    written = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in written] == ["report.html", "report-load.png", "report-curves.png"]
    for path in written[1:]:
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_absent_packages_get_a_sentence(tmp_path, capsys, monkeypatch):
    write(tmp_path, [line(0, {"a": layer([1, 1])})])
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] in ("matplotlib", "tokenizers"):
            raise ImportError(name)
        return real(name, *rest, **more)

    for name in [name for name in sys.modules if name.partition(".")[0] in ("matplotlib", "tokenizers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main([str(tmp_path), "--png"]) == 2
    assert "--png: expected the package matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert main([str(tmp_path), "--tokenizer", "x"]) == 2
    assert "--tokenizer: expected the package tokenizers: pip install tokenizers" in capsys.readouterr().err


def test_a_long_wide_run_is_thinned(tmp_path):
    """Sixty layers of 256 experts: its page would hold 30 MB without."""
    names = tuple(f"blocks.{i}" for i in range(60))
    lines = [line(step, dict.fromkeys(names, layer([step % 3, *[4] * 255]))) for step in range(150)]
    columns = columns_of(read_run(write(tmp_path, lines, names, experts=256)))
    assert len(columns.steps) == 75
    cells = sum(len(load_bytes(layer)) for layer in columns.layers.values())
    assert cells <= 2_000_000
