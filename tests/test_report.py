"""report.py and reporting/: every run folder, however damaged, becomes one readable, self-contained page."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import report
from cli import run_main
from config import Config, ConfigError, override
from reporting.metrics import METRICS
from reporting.read import read_run, read_runs
from reporting.tables import differing

ROOT = Path(__file__).resolve().parent.parent
LADDER = [
    {"context": 1, "ce": 2.4865, "accuracy": 0.27},
    {"context": 2, "ce": 2.056, "accuracy": 0.381},
    {"context": 3, "ce": 1.79, "accuracy": 0.472},
]


def make_run(
    folder: Path,
    *,
    steps: int = 100,
    every: int = 5,
    evaluate: int = 25,
    info: dict[str, Any] | None = None,
    **groups: Any,
) -> Path:
    """A run folder with every documented key: lines of training, lines of evaluation, samples, ladder."""
    folder.mkdir(parents=True)
    record = {
        "preset": "avatarl-char",
        "config": override(Config(), train={"steps": steps}, **groups).to_dict(),
        "corpus": {"name": "tinyshakespeare", "sha256": "ab" * 32, "source": "download", "fallback": False},
        "tokenizer": "cd" * 32,
        "vocab_size": 65,
        "parameters": 804096,
        "versions": {"python": "3.11", "torch": "2.13"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "hardware": {"device": "cpu", "processor": "Some CPU", "dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps(record | (info or {})))
    (folder / "ladder.json").write_text(json.dumps(LADDER))
    lines, samples = [], ""
    for step in range(0, steps + 1, every):
        head = {"step": step, "tokens": step * 768, "seconds": step / 10}
        if step:
            names = [key for key in METRICS if "/" in key and not key.startswith("val/")]
            train = {key: 0.5 + math.sin(step + i) / 10 for i, key in enumerate(names)}
            lines.append(head | {"lr": 1e-3} | train)
        if step % evaluate == 0:
            ce = 1.5 + 2.5 * math.exp(-8 * step / steps)
            accuracy = 0.6 - ce / 8
            lines.append(
                head
                | {"val/ce": ce, "val/ppl": math.exp(ce), "val/bpb": ce / math.log(2)}
                | {"val/accuracy": accuracy, "val/ece": 0.02}
            )
            samples += f"=== step {step}\nROMEO:\n<b>Hark</b> & listen, {step}!\n\n"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.txt").write_text(samples)
    return folder


def page_of(*folders: Path) -> str:
    """The page about the folders, as report.py writes it."""
    return report.write_report(folders, folders[0].parent / "page.html").read_text(encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    """Replace entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Outline(HTMLParser):
    """Checks that tags nest, and gathers text and ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] not in ("script", "style") else ""


def test_page_shows_everything_about_a_run(tmp_path: Path) -> None:
    """Catches a section that is lost, and a logged metric that has no chart."""
    text = Outline(page := page_of(make_run(tmp_path / "base", model={"n_layer": 4}))).text
    for fact in ("base", "avatarl-char", "tinyshakespeare", "804,096", "Some CPU", "0123456789ab with"):
        assert fact in text, fact
    for key, metric in METRICS.items():
        assert metric.label in text and metric.explanation in text, key
    assert page.count('<figure class="chart') == len(METRICS)
    assert "fallback corpus" not in text
    assert "1.5008" in text and "at step 100" in text and "76.8 k" in text and "7,680" in text


def test_page_is_well_formed_and_ids_are_unique(tmp_path: Path) -> None:
    """Catches an unclosed tag, which swallows the rest of the page, and ids that shadow one another."""
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    for page in (page_of(folders[0]), page_of(*folders)):
        outline = Outline(page)
        assert not outline.open
        assert len(set(outline.ids)) == len(outline.ids)
        for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
            ElementTree.fromstring(svg)


def test_page_asks_nothing_from_outside(tmp_path: Path) -> None:
    """Catches a font, script or image that is fetched: the page must work from a USB stick."""
    page = page_of(make_run(tmp_path / "base"))
    assert not re.findall(r"(?:src|href)=(?![\"']?(?:data:|#))|@import|url\((?!#)|fetch\(", page)
    assert "default-src 'none'" in page


def test_texts_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    """Catches a sample, name, key or setting that is pasted unescaped."""
    nasty = "</script><script>alert(1)</script>"
    folder = make_run(tmp_path / "a&<b>", info={"preset": nasty, "corpus": {"name": nasty}, nasty: nasty})
    other = make_run(tmp_path / "c", data={"corpus": nasty})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 100, f"health/{nasty}": 1.0}) + "\n")
    for folders in ([folder], [folder, other]):
        page = page_of(*folders)
        assert "<script>alert" not in page and "<b>" not in page
        assert "&lt;b&gt;Hark&lt;/b&gt; &amp; listen, 100!" in page
        assert not Outline(page).open


def test_samples_last_first_and_earlier_folded(tmp_path: Path) -> None:
    """Catches samples in the wrong order, and a flood of them in a long run."""
    folder = make_run(tmp_path / "a", steps=1000, every=5, evaluate=5)
    page = page_of(folder)
    shown, folded = page[page.index("<h2>Samples") :].split("<details>", 1)
    assert "step 1,000</h3>" in shown and "listen, 1000!" in shown
    assert "60 of 200" in folded and folded.count("listen, ") == 60


def test_ladder_stands_beside_the_curves(tmp_path: Path) -> None:
    """Catches missing or mislabelled n-gram lines, and a wrong step at which they were passed."""
    folder = make_run(tmp_path / "a")
    page = page_of(folder)
    assert page.count('<path class="rung"') == 2 * len(LADDER)
    assert ">1: 27.0 %<" in page and ">2: 2.056<" in page and "3: 4-gram" in page
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(r["step"] for r in rows if r.get("val/ce", 9) < 2.056)
    assert re.search(rf"2: trigram</th><td>2.0560</td><td>38.1 %</td><td>in CE by step {first},", page)
    other = make_run(tmp_path / "b")
    (other / "ladder.json").write_text(json.dumps(LADDER[:1]))
    both = page_of(folder, other)
    assert '<path class="rung"' not in both and "different n-gram ladders" in both


def test_fallback_corpus_is_said_loudly(tmp_path: Path) -> None:
    """Catches a benchmark that silently ran on the embedded text."""
    corpus = {"name": "pydoc", "sha256": "0", "fallback": True}
    page = page_of(make_run(tmp_path / "a", info={"corpus": corpus}))
    assert 'class="notice warning"' in page and "embedded fallback corpus “pydoc”" in page


def test_one_run_shows_its_differences_from_the_defaults(tmp_path: Path) -> None:
    """Catches a list of all settings, or of none, where the few that were chosen should stand."""
    folder = make_run(tmp_path / "a", model={"n_layer": 4}, run={"name": "a"})
    section = page_of(folder).split("<h2>Configuration", 1)[1].split("<details>", 1)[0]
    cells = [f"<code>{c}</code>" for c in ("model.n_layer", "4", "12")]
    assert f'<th scope="row">{cells[0]}</th><td>{cells[1]}</td><td>{cells[2]}</td>' in section
    assert section.count('<th scope="row">') == 2  # n_layer and train.steps


def test_several_runs_show_where_they_differ(tmp_path: Path) -> None:
    """Catches equal settings in the table, and settings of other versions that break it."""
    a, b = (make_run(tmp_path / n, optim={"lr": lr}) for n, lr in (("a", 1e-3), ("b", 3e-3)))
    groups = json.loads((b / "config.json").read_text())["config"]
    change(b / "config.json", config=groups | {"novel": {"knob": [1, 2]}})
    section = page_of(a, b).split("<h2>Configuration", 1)[1].split("<details>", 1)[0]
    assert re.findall(r'row"><code>(.*?)<', section) == ["optim.lr", "novel.knob"]
    assert "<td><code>0.001</code></td><td><code>0.003</code></td>" in section
    assert "<td>—</td><td><code>[1, 2]</code></td>" in section


def test_comparison_marks_the_best_only_where_runs_compare(tmp_path: Path) -> None:
    """Catches a winner by cross-entropy between runs with different tokens or text."""
    same = [make_run(tmp_path / n, steps=s) for n, s in (("a", 100), ("b", 200))]
    page = page_of(*same)
    assert "<td class=best>1.5008" in page and "different tokens" not in page
    bpe = make_run(tmp_path / "bpe", info={"vocab_size": 1024})
    assert differing(read_runs([same[0], bpe])) == {"tokens"}
    page = page_of(same[0], bpe)
    assert "<td class=best>1.5008" not in page and "compare bits per byte" in page
    assert "<td class=best>2.1653" in page
    text = make_run(tmp_path / "text", info={"corpus": {"name": "mine", "sha256": "9"}})
    page = page_of(same[0], text)
    assert "<td class=best>2.1653" not in page and "different text" in page
    elsewhere = make_run(tmp_path / "elsewhere", data={"val_corpus": "other.txt"})
    own = make_run(tmp_path / "own", data={"val_corpus": None})
    assert differing(read_runs([own, elsewhere])) == {"text"}


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "ladder.json", "samples.txt"])
@pytest.mark.parametrize("damage", ["absent", "empty", "binary", "wrong type"])
def test_damaged_files_do_not_stop_the_page(tmp_path: Path, file: str, damage: str) -> None:
    """Catches a report that dies, at the end of a long run, of a file that is missing or broken."""
    folder, whole = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    path = folder / file
    path.unlink()
    if damage != "absent":
        wrong = b'["x", {"context": null}]\n3\n'
        path.write_bytes({"empty": b"", "binary": b"\xff\x00{", "wrong type": wrong}[damage])
    for folders in ([folder], [whole, folder]):
        assert not Outline(page_of(*folders)).open


def test_run_before_its_first_line_and_without_evaluations(tmp_path: Path) -> None:
    """Catches a report that needs at least one evaluation, or one line."""
    folder = make_run(tmp_path / "a", evaluate=1000)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(folder)
    assert "<h2>Validation" not in page and "<h2>Reward and policy" in page
    (folder / "metrics.jsonl").write_text("")
    assert "Nothing has been logged yet" in page_of(folder)
    (folder / "metrics.jsonl").write_text('{"step": 0, "val/ce": 4.2}\n')
    assert "4.2000" in page_of(folder)


def test_truncated_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    """Catches a crash on the half line that a killed run leaves."""
    path = make_run(tmp_path / "a") / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    page = page_of(path.parent)
    assert "last line of metrics.jsonl is incomplete" in page
    assert page.count('<figure class="chart') == len(METRICS)


def test_interrupted_run_is_said_to_be_incomplete(tmp_path: Path) -> None:
    """Catches final numbers of a run that was stopped half-way, passed off as its result."""
    path = make_run(tmp_path / "a", steps=200) / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:20]))
    assert "of 200 planned" in page_of(path.parent)
    assert "planned" not in page_of(make_run(tmp_path / "b"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nan", "-inf", 10**400])
def test_non_finite_values_are_gaps_and_counted(tmp_path: Path, bad: Any) -> None:
    """Catches NaN in SVG paths, a line drawn across a hole, and a stale number shown as the final one."""
    folder = make_run(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[6]["train/loss"] = bad
    rows[-1]["val/ce"] = bad
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder, "a")
    assert run.lost("train/loss") == 1 and sum(p.gap for p in run.points("train/loss")) == 1
    page = page_of(folder)
    assert "1 value not finite" in page and "<dt>Validation CE, nats</dt><dd>—" in page
    for path in re.findall(r' d="([^"]*)"', page):
        assert "nan" not in path and "inf" not in path
    loss = next(f for f in page.split("<figure") if "<code>train/loss<" in f)
    assert loss.split('class="line" d="')[1].split('"')[0].count("M") == 2


def test_keys_that_only_some_runs_have(tmp_path: Path) -> None:
    """Catches a comparison that needs the same keys, such as a baseline without rewards."""
    run, base = make_run(tmp_path / "run"), make_run(tmp_path / "base")
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    keep = ("step", "train/loss", "val/ce", "mystery/flag", "mystery/level")
    rows = [row | {"mystery/level": 1, "mystery/flag": True} for row in rows]
    kept = [{k: v for k, v in row.items() if k in keep} for row in rows]
    (base / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    page = page_of(run, base)
    assert not Outline(page).open
    assert "<h2>Mystery" in page and "mystery/level" in page and "mystery/flag" not in page
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page)[0])
    assert [series["name"] for series in data["runs"]] == ["run", "base"]
    assert set(data["runs"][1]["tokens"]) == {None}


def test_later_line_of_a_step_counts(tmp_path: Path) -> None:
    """Catches curves that run backwards after a resume that logged a step again."""
    path = make_run(tmp_path / "a") / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 50, "val/ce": 9.0}\n')
    points = read_run(path.parent, "a").points("val/ce")
    assert [p.step for p in points] == [0, 25, 50, 75, 100]
    assert points[2].value == 9.0


def test_long_runs_stay_small(tmp_path: Path) -> None:
    """Catches pages that grow with the run: three long ones and many short ones stay below 2 MB."""
    long = make_run(tmp_path / "long", steps=20_000, every=8, evaluate=100)
    assert len(page_of(long, make_run(tmp_path / "short"))) < 2_000_000
    many = [make_run(tmp_path / f"r{i}", steps=500, every=5) for i in range(12)]
    page = page_of(*many)
    assert len(page) < 2_000_000
    assert 'class="chip c1 dashed"' in page  # ninth run and later


def test_runs_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    """Catches a legend in which two runs cannot be told apart, and a run that is compared with itself."""
    folders = [make_run(tmp_path / place / "base") for place in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/base", "y/base"]
    assert len(read_runs([folders[0], folders[0]])) == 1


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page in the wrong place, and a script that does not start from another folder."""
    a, b = make_run(tmp_path / "runs" / "a"), make_run(tmp_path / "runs" / "b")
    command = [sys.executable, str(ROOT / "report.py"), "runs/a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/a/report.html\n", "")
    assert (a / "report.html").stat().st_mode & 0o444 == 0o444
    monkeypatch.chdir(tmp_path)
    report.main([str(a), str(b)])
    assert "2 runs compared" in (tmp_path / "report.html").read_text()
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    report.main([str(a), str(b), "--out", "new/ab.html", "--open"])
    assert opened == [(tmp_path / "new" / "ab.html").as_uri()]


def test_bad_usage_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tracebacks, wrong exit codes, and pages about folders that are no runs."""
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments, code, words in (
        (["empty"], 2, "neither config.json nor metrics.jsonl"),
        ([run, "absent"], 2, "no such folder"),
        ([], 2, "no run folder given"),
        ([run, "--out", "empty"], 2, "name a file"),
        ([run, "--out", "run/config.json/page.html"], 1, "cannot be written"),
    ):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(report.main)
        said = capsys.readouterr().err
        assert end.value.code == code and said.count("\n") == 1
        assert said.startswith("error: ") and words in said
    assert sorted(tmp_path.rglob("*")) == before


def test_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a half-written page, and temporary files left beside it."""
    folder = make_run(tmp_path / "a")
    out = tmp_path / "page.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"page\.html.*No space left"):
        report.write_report([folder], out)
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["a", "page.html"]


def test_no_folders_is_an_error(tmp_path: Path) -> None:
    """Catches an empty page for an empty list."""
    with pytest.raises(ConfigError, match="no run folder"):
        report.write_report([], tmp_path / "page.html")


def test_reading_runs_needs_no_torch() -> None:
    """Catches an import that makes a report wait for PyTorch, or fail where it isn't installed."""
    code = "import sys, report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
