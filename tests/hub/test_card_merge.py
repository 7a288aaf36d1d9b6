"""Merging a card with the one that is there: nothing that a person wrote is lost."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_recycle.card.merge import BEGIN, END, compose_card, merge_card

OURS = compose_card({"library_name": "transformers", "tags": ["hf_recycle", "masked-lm"]}, "# A model\n\nStep 10.")
LATER = compose_card({"library_name": "transformers", "tags": ["hf_recycle"], "datasets": ["a/b"]}, "# A model\n\n20.")


def header_of(card: str) -> dict:
    return yaml.safe_load(REGEX_YAML_BLOCK.match(card)[2])


def test_a_first_card_is_written_as_it_is():
    assert merge_card("", OURS) == OURS
    assert merge_card(OURS, OURS) == OURS


def test_text_around_the_marks_survives_and_ours_is_replaced():
    before, after = "Written by hand above.\n\n", "\n## Thanks\n\nTo <!-- a comment --> all.\n"
    theirs = OURS.replace(BEGIN, before + BEGIN) + after
    merged = merge_card(theirs, LATER)
    assert merged == LATER.replace(BEGIN, before + BEGIN) + after
    assert "Step 10" not in merged


def test_the_users_header_survives_with_its_comments_and_layout():
    theirs = OURS.replace("---\n\n", "# licensed by the lab\nlicense:   mit # for now\nextra: {a: [1, 2]}\n---\n\n", 1)
    merged = merge_card(theirs, LATER)
    assert "# licensed by the lab\nlicense:   mit # for now\nextra: {a: [1, 2]}\n" in merged
    header = header_of(merged)
    assert header["tags"] == ["hf_recycle"], "still as we wrote it, so it is brought up to date"
    assert header["datasets"] == ["a/b"], "never there, so it is written"


def test_a_value_of_ours_changed_by_hand_stays_changed():
    ours = compose_card({"pipeline_tag": "fill-mask", "base_model": "a/b"}, "x")
    merged = merge_card(ours.replace("fill-mask", "feature-extraction"), ours)
    assert header_of(merged) == {"pipeline_tag": "feature-extraction", "base_model": "a/b"}


def test_a_value_of_ours_that_is_no_longer_true_goes():
    merged = merge_card(compose_card({"base_model": "a/b", "tags": ["t"]}, "x"), compose_card({"tags": ["t"]}, "x"))
    assert header_of(merged) == {"tags": ["t"]}


@pytest.mark.parametrize("edit", ["- hf_recycle\n", "- masked-lm\n", "tags:\n- hf_recycle\n- masked-lm\n"])
def test_a_tag_deleted_by_hand_stays_deleted(edit):
    theirs = OURS.replace(edit, "")
    mine = header_of(theirs).get("tags")
    for ours in (OURS, LATER, OURS):
        theirs = merge_card(theirs, ours)
        assert header_of(theirs).get("tags") == mine


def test_a_list_with_an_entry_of_the_users_is_the_users():
    theirs = OURS.replace("- masked-lm\n", "- masked-lm\n- my-tag\n")
    assert header_of(merge_card(theirs, LATER))["tags"] == ["hf_recycle", "masked-lm", "my-tag"]


def test_a_key_deleted_by_hand_stays_deleted_and_one_that_we_took_away_comes_back():
    with_task, without = (compose_card(header, "x") for header in ({"pipeline_tag": "fill-mask", "a": 1}, {"a": 2}))
    deleted = with_task.replace("pipeline_tag: fill-mask\n", "")
    for ours in (with_task, without, with_task):
        deleted = merge_card(deleted, ours)
        assert "pipeline_tag" not in header_of(deleted)
    assert header_of(merge_card(merge_card(with_task, without), with_task))["pipeline_tag"] == "fill-mask"


def test_what_came_with_a_card_of_ours_is_remembered_as_well():
    """Such as a license that `create_model_card` was given."""
    ours = OURS.replace("---\n\n", "license: mit\n---\n\n", 1)
    published = merge_card("", ours)
    assert header_of(published)["license"] == "mit"
    without = merge_card(published.replace("license: mit\n", ""), ours)
    assert "license" not in header_of(without)


SECTIONS = (
    "# A model\n\nStep {0}.\n\n## Results\n\nLoss {0}.\n\n## Training\n\n```bash\n# run\n```\n\n## Limits\n\nNone."
)


def test_a_section_deleted_by_hand_stays_deleted_and_the_others_are_renewed():
    first, second = (compose_card({}, SECTIONS.format(step)) for step in (1, 2))
    theirs = first[: first.index("\n## Training")] + first[first.index("\n## Limits") :]
    for ours in (first, second, second):
        theirs = merge_card(theirs.replace("\n", "\r\n"), ours)
        assert "\n## Training" not in theirs
        assert "# run" not in theirs
    assert "Step 2.\n\n## Results\n\nLoss 2.\n\n## Limits\n\nNone.\n\n" + END in theirs
    shorter = compose_card({}, "# A model\n\n## Results\n\nLoss.")
    assert "\n## Training" in merge_card(merge_card(first, shorter), second), "what we took away ourselves comes back"


def test_where_nothing_is_left_between_the_marks_nothing_is_written():
    theirs = f"---\nlicense: mit\n---\nMine.\n\n{BEGIN}\n\n{END}\n"
    assert merge_card(theirs, OURS) == theirs


def test_a_card_without_marks_keeps_its_text_above_ours():
    theirs = "---\nlicense: mit\ntags: other\n---\n# Mine\n\nText without a last line end"
    merged = merge_card(theirs, OURS)
    assert "# Mine\n\nText without a last line end\n\n" + BEGIN in merged
    assert header_of(merged) == {"library_name": "transformers", "license": "mit", "tags": "other"}


def test_a_damaged_header_is_kept_as_text():
    merged = merge_card("---\nlicense: [mit\n---\nText\n", OURS)
    assert "license: [mit" in merged
    assert "Text" in merged
    assert ModelCard(merged).data.library_name == "transformers"


@pytest.mark.parametrize(
    "header", ["", "---\n---\n", "---\n# nothing\n---\n", "---\njust words\n---\n", "---\n- a\n---\n"]
)
@pytest.mark.parametrize("theirs", ["", "# Mine\n", "---\nlicense: mit\n---\n# Mine\n", OURS])
def test_ours_without_a_header(header, theirs):
    """As in a folder whose card was edited: what we have lost there is no fact of ours any more."""
    ours = header + OURS[OURS.index(BEGIN) :]
    merged = merge_card(theirs, ours)
    assert merge_card(merged, ours) == merged
    assert merged.count(BEGIN) == merged.count(END) == 1
    assert ("# Mine" in merged) == ("# Mine" in theirs)
    kept = {"license": "mit"} if "license" in theirs else None
    assert (header_of(merged) if REGEX_YAML_BLOCK.match(merged) else None) == kept
    with pytest.raises(ValueError, match="substring"):
        merge_card(theirs, header + "# A card without our marks\n")


def test_the_end_mark_lost_loses_no_text():
    theirs = OURS.replace(END + "\n", "") + "Mine, at the end.\n"
    merged = merge_card(theirs, LATER)
    assert "Mine, at the end.\n" in merged
    assert merged.count(BEGIN) == merged.count(END) == 1
    assert header_of(merged)["tags"] == ["hf_recycle"]  # what we wrote is still remembered


def test_aliases_cannot_fill_the_memory():
    levels = "".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}, *k{i - 1}]\n" for i in range(1, 60))
    merged = merge_card(f"---\nk0: &k0 [x]\n{levels}---\nText\n", OURS)
    assert "Text" in merged
    assert header_of(merged)["library_name"] == "transformers"


# ---- For any text ----

lines = st.one_of(
    st.sampled_from(
        [BEGIN, END, "---", "```", "", "tags:", "- mine", "license: mit", "tags: [a, b]", "# c", "\r", "  x"]
    ),
    st.sampled_from(OURS.split("\n")),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=12),
)
texts = st.lists(lines, max_size=25).map("\n".join)
EMPTIED = re.compile(rf"{re.escape(BEGIN)}\s*{re.escape(END)}")
headers = st.dictionaries(
    st.sampled_from(["tags", "datasets", "license", "library_name", "x-1"]),
    st.one_of(st.none(), st.integers(), st.text("ab #:", max_size=5), st.lists(st.text("ab#", max_size=3), max_size=3)),
    max_size=4,
)


def survivors(text: str) -> list[str]:
    """The lines a person wrote: outside of the pairs of marks, and not a mark."""
    kept: list[str] = []
    pending: list[str] | None = None
    for line in text.split("\n"):
        if line == BEGIN:
            kept += pending or []
            pending = []
        elif line == END:
            pending = None
        elif pending is not None:
            pending.append(line)
        else:
            kept.append(line)
    return [line for line in kept + (pending or []) if line.strip() and not line.startswith("<!-- hf_recycle:written")]


@given(texts)
def test_merging_twice_changes_nothing_and_no_written_line_is_lost(body):
    theirs = f"---\nlicense: mit\n---\n{body}"
    assume(not EMPTIED.search(body))
    merged = merge_card(theirs, OURS)
    assert merge_card(merged, OURS) == merged
    assert header_of(merged)["license"] == "mit"
    assert merged.count(BEGIN) == merged.count(END) == 1
    outside = merged[: merged.index(BEGIN)] + merged[merged.index(END) :]
    written = outside.split("\n")
    for line in survivors(body):
        written.remove(line)  # as often as it was there


@given(texts)
def test_any_card_becomes_a_valid_one(theirs):
    assume(not EMPTIED.search(theirs))
    merged = merge_card(theirs, OURS)
    assert ModelCard(merged).data.library_name == "transformers" or "library_name" in theirs
    assert merge_card(merged, OURS) == merged


@given(headers, headers, headers)
def test_headers_of_any_shape(theirs, before, now):
    """What the user has beyond our last card stays, through this card and the next."""
    first, second = compose_card({**before, "k": 1}, "x"), compose_card({**now, "k": 2}, "y")
    mine = {**theirs, "own": "kept"}
    merged = merge_card(f"---\n{yaml.safe_dump(mine)}---\nText\n", first)
    for ours in (first, second):
        merged = merge_card(merged, ours)
        assert merge_card(merged, ours) == merged
        header = header_of(merged)
        assert header["own"] == "kept"
        for key in ("tags", "datasets"):
            for item in theirs.get(key) or [] if isinstance(theirs.get(key), list) else []:
                assert item in header[key] or item in (before.get(key) or [])
    assert header_of(merged)["k"] == 2
