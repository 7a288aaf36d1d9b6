"""The example of domains in a row, in small: what is measured where, that arms see the same, and that it goes on."""

import argparse
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from pages import ROOT


@pytest.fixture
def script(monkeypatch):
    spec = spec_from_file_location("shifting_domains", ROOT / "examples" / "shifting_domains.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTH", 8)
    monkeypatch.setattr(module, "VOCABULARY", 280)
    monkeypatch.setattr(module, "MODEL", module.MODEL | {"n_embd": 8, "n_layer": 1, "n_positions": 8})
    monkeypatch.setitem(module.ARMS["l2_init and dormant"], "recycle_steps", 2)
    monkeypatch.setitem(module.ARMS["l2_init and dormant"], "recycle_threshold", 1.0)  # some are below the mean
    return module


@pytest.fixture
def files(tmp_path):
    texts = {"foxes": "the quick brown fox jumps\n", "numbers": "12 34 56 78 90\n", "shouts": "OH! NO! OH! YES!\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text * 40)
    return [str(tmp_path / f"{name}.txt") for name in texts]


def options(files, tmp_path, **more):
    return argparse.Namespace(**{"files": files, "steps": 3, "batch": 2, "held_out": 4, "output_dir": tmp_path} | more)


def test_measures_are_of_new_domains_of_old_ones_and_of_all(script):
    losses = {
        "a": {"a": 5.0, "b": 9.0, "c": 9.0},
        "b": {"a": 6.0, "b": 4.0, "c": 9.0},
        "c": {"a": 8.0, "b": 5.0, "c": 2.0},
    }
    assert script.measures(losses) == {"new": 3.0, "forgetting": 2.0, "end": 5.0}


def test_held_out_sequences_are_the_end_of_each_text(script, files):
    size, domains = script.read(tuple(files), 6, 4)
    assert list(domains) == ["foxes", "numbers", "shouts"]
    for trained, held_out in domains.values():
        assert len(held_out) == 4
        assert len(trained) >= 6
        assert all(len(row["input_ids"]) == 8 and max(row["input_ids"]) < size for row in trained + held_out)


def test_a_text_that_is_too_short_is_named(script, files):
    with pytest.raises(SystemExit, match="foxes has"):
        script.read(tuple(files), 10**4, 4)


@pytest.mark.slow
def test_the_first_domain_is_the_same_for_plain_and_fresh_and_the_seed_says_which_it_is(script, files, tmp_path):
    settings = options(files, tmp_path)
    plain, _ = script.train("plain", 1e-3, 1, settings)
    fresh, _ = script.train("fresh", 1e-3, 1, settings)
    assert list(plain) == list(fresh) == ["numbers", "shouts", "foxes"]
    assert plain["numbers"] == fresh["numbers"]
    assert plain["shouts"] != fresh["shouts"]


@pytest.mark.slow
def test_the_comparison_reports_every_seed_and_goes_on_where_it_was(script, files, tmp_path, monkeypatch, capsys):
    words = [*files, "--output_dir", str(tmp_path / "out"), "--steps", "3", "--batch", "2", "--held_out", "4"]
    monkeypatch.setattr(sys, "argv", ["shifting_domains.py", *words, "--seeds", "1", "2"])
    script.main()
    report = (tmp_path / "out" / "report.md").read_text()
    known = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert len(known) == len(script.ARMS) * 4  # two rates on one seed, one on two
    assert report.count("| fresh |") == 4
    assert all(int(n) > 0 for n in report.rsplit("by seed: ", 1)[1].strip(".\n").split(", "))

    monkeypatch.setattr(script, "train", None)
    capsys.readouterr()
    script.main()
    assert capsys.readouterr().out == report
