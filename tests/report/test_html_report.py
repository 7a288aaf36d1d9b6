"""`hf-recycle report`: one page that is whole, valid, needs nothing beside it and runs one script, which is ours."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from support.simulated_runs import write_run

from hf_recycle.card.citation import ADDRESS
from hf_recycle.cli.main import main
from hf_recycle.records import files

HOSTILE = "</td><script>alert(1)</script>\"' onload=x <img src=http://evil.example/x.png>"
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Collects elements and text, and checks that tags are nested as they should be."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder, tmp_path, *more) -> tuple[str, Page]:
    output = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(output), *more]) == 0
    text = output.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_holds_everything_itself(tmp_path):
    run = tmp_path / "my-run"
    (run / "checkpoint-30").mkdir(parents=True)
    (run / "checkpoint-4").mkdir()
    write_run(run / "checkpoint-4", phases=1)
    write_run(run / "checkpoint-30", phases=2)
    text, page = page_of(run, tmp_path)
    assert text.startswith("<!DOCTYPE html>")
    assert "in 16 recyclings over 2 selection phases" in " ".join(page.text.split())  # of the newest checkpoint
    assert len(page.all("svg")) == len(page.all("figure")) == 4
    assert all(frame["aria-label"] for frame in page.all("div") if frame.get("class") == "frame")
    for image in page.all("image"):
        kind, _, data = image["xlink:href"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"""(?:url\(|xlink:href="|for=")#?([\w.-]+)""", re.sub(r'"data:[^"]*', "", text))
    assert set(used) <= set(ids)
    assert "evaluation loss at step 30: " in page.text  # where a pointer rests
    assert {"link", "iframe", "a"}.isdisjoint(tag for tag, _ in page.elements)
    without_script = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in without_script.replace("http-equiv", "").replace(ADDRESS, "")
    assert page.text.count("my-run") == 2  # in the title and in the heading
    assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))


def test_the_only_script_that_a_browser_runs_is_the_zoom(tmp_path):
    write_run(tmp_path)
    text, page = page_of(tmp_path, tmp_path)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert page.all("script") == [{}]
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    assert len(script) < 16_000


def test_what_a_stranger_wrote_stays_text(tmp_path):
    write_run(tmp_path, blocks=("a." + HOSTILE.replace("/", ""), "b"))
    facts = {"command": HOSTILE, "arguments": {HOSTILE: HOSTILE}, "data": {"name": HOSTILE}}
    facts |= {"hardware": {"device": HOSTILE}, "versions": {HOSTILE: HOSTILE}, "base_model": {"name": HOSTILE}}
    files.write_config(tmp_path, files.read_config(tmp_path) | {"run": facts})
    _, page = page_of(tmp_path, tmp_path)
    assert page.all("script") == [{}]  # ours
    assert not page.all("img")
    assert all(image["xlink:href"].startswith("data:") for image in page.all("image"))
    assert not [attributes for _, attributes in page.elements if "onload" in attributes]
    assert page.text.count(HOSTILE) >= 7


def test_a_run_with_little_to_tell(tmp_path):
    write_run(tmp_path, phases=0, losses=False, magnitudes=False)
    _, page = page_of(tmp_path, tmp_path)
    assert not page.all("figure")
    assert len(page.all("h2")) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        ([".", "--revision", "main"], "revision='main'"),
        (["{empty}"], "holds no checkpoints"),
        (["{run}", "--output", "{empty}/no/such/folder.html"], "folder.html"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, words, named):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path)
    words = [word.format(empty=tmp_path / "empty", run=tmp_path) for word in words]
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error


def test_help(capsys):
    assert main(["report", "--help"]) == 0
    assert "RUN_OR_REPO" in capsys.readouterr().out
    assert main(["report"]) == 2
