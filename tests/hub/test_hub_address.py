import pytest
from huggingface_hub import parse_hf_uri

from hf_recycle.data.arguments import ModelArguments
from hf_recycle.errors import UserError
from hf_recycle.hub.address import HubAddress, is_address, locate

ADDRESSES = [
    ("hf://user/repo", ("user/repo", None, None)),
    ("hf://user/repo/last-checkpoint", ("user/repo", "last-checkpoint", None)),
    ("hf://a-b/c.d_e@v1.0/checkpoint-120", ("a-b/c.d_e", "checkpoint-120", "v1.0")),
    ("hf://user/repo@refs/pr/3/checkpoint-4", ("user/repo", "checkpoint-4", "refs/pr/3")),
    ("hf://user/repo@feature%2Fx-1", ("user/repo", None, "feature/x-1")),
    ("hf://user/repo@main/models/base", ("user/repo", "models/base", "main")),
]


@pytest.mark.parametrize(("text", "parts"), ADDRESSES)
def test_addresses_are_those_of_huggingface_hub(text, parts):
    address = HubAddress.parse(text)
    assert (address.repo_id, address.folder, address.revision) == parts
    assert str(address) == text
    theirs = parse_hf_uri(text)
    assert (theirs.id, theirs.path_in_repo or None, theirs.revision) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        *((text.replace("hf://", "hub://"), parts) for text, parts in ADDRESSES[:-1]),
        ("hf://models/user/repo", ("user/repo", None, None)),
        # As earlier versions spelled them.
        ("hub://a-b/c.d_e/checkpoint-120@v1.0", ("a-b/c.d_e", "checkpoint-120", "v1.0")),
        ("hub://user/repo@refs/pr/3", ("user/repo", None, "refs/pr/3")),
        ("hub://user/repo@feature/x-1", ("user/repo", None, "feature/x-1")),
        ("hub://user/repo@feature/x/checkpoint-4", ("user/repo", "checkpoint-4", "feature/x")),
        ("hub://user/repo/last-checkpoint@refs/heads/x", ("user/repo", "last-checkpoint", "refs/heads/x")),
    ],
)
def test_other_spellings(text, parts):
    address = HubAddress.parse(text)
    assert (address.repo_id, address.folder, address.revision) == parts
    assert HubAddress.parse(str(address)) == address


@pytest.mark.parametrize("scheme", ["hf://", "hub://"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the form is hf://user/repo"),
        ("bert-base-uncased", "the form is hf://user/repo"),
        ("user/", "the form is hf://user/repo"),
        ("/repo", "the form is hf://user/repo"),
        ("../etc/last-checkpoint", "Repo id must"),
        ("user/..", "Repo id must"),
        ("us%2fer/repo", "Repo id must"),
        ("user/repo/..", "not a folder"),
        ("user/repo/a/../../b", "not a folder"),
        ("user/repo/checkpoint-1\n", "not a folder"),
        ("user/repo/checkpoint-" + "1" * 4000, "not a folder"),
        ("user/repo@", "Empty revision"),
        ("user/repo@a b", "not the name of a branch"),
        ("user/repo@a..b", "not the name of a branch"),
        ("user/repo@%2e%2e/x", "not the name of a branch"),
        ("datasets/user/repo", "names a dataset"),
    ],
)
def test_malformed_addresses(scheme, text, problem):
    with pytest.raises(UserError, match=problem) as error:
        HubAddress.parse(scheme + text)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["checkpoint-", "checkpoint-1x", "models/base", "x-1"])
def test_only_a_checkpoint_is_resumed_from(folder):
    with pytest.raises(UserError, match="write last-checkpoint or checkpoint-N, and a slash in a revision as %2F"):
        HubAddress.parse(f"hf://user/repo@feature/{folder}").check_checkpoint()
    HubAddress.parse("hf://user/repo@feature/last-checkpoint").check_checkpoint()
    HubAddress.parse("hf://user/repo").check_checkpoint()


def test_what_is_meant_as_an_address():
    assert is_address("hf://x")
    assert is_address("hub://x")
    assert not any(is_address(other) for other in (None, True, "runs/hub", "checkpoint-3", "hf:/x"))


def test_a_revision_beside_an_address():
    assert locate("hf://user/repo/a", "v1") == ("user/repo", "a/", "v1")
    assert locate("hf://user/repo@v1", "v1") == ("user/repo", "", "v1")
    assert locate("plain", "v1") == ("plain", "", "v1")
    with pytest.raises(UserError, match=r"revision='v2' contradicts hf://user/repo@v1"):
        locate("hf://user/repo@v1", "v2")


def test_models_of_a_run_by_address():
    arguments = ModelArguments(model_name_or_path="hf://user/repo@v1", tokenizer_name="hub://user/words")
    assert (arguments.model_name_or_path, arguments.model_revision) == ("user/repo", "v1")
    assert arguments.tokenizer_name == "user/words"
    for wrong, problem in (
        ({"model_name_or_path": "hf://user/repo/checkpoint-4"}, "names a folder"),
        ({"config_name": "hf://user/repo@v1", "model_revision": "v2"}, "contradicts"),
        ({"tokenizer_name": "hf://user/words@v1"}, "names a revision"),
        ({"model_name_or_path": "hf://gpt2"}, "the form is"),
    ):
        with pytest.raises(UserError, match=problem):
            ModelArguments(**wrong)
