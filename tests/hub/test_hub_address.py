import pytest

from hf_recycle.errors import UserError
from hf_recycle.hub.address import HubAddress, is_address


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub://user/repo", ("user/repo", None, None)),
        ("hub://user/repo/last-checkpoint", ("user/repo", "last-checkpoint", None)),
        ("hub://a-b/c.d_e/checkpoint-120@v1.0", ("a-b/c.d_e", "checkpoint-120", "v1.0")),
        ("hub://user/repo@refs/pr/3", ("user/repo", None, "refs/pr/3")),
        ("hub://user/repo@feature/x-1", ("user/repo", None, "feature/x-1")),
    ],
)
def test_addresses(text, parts):
    address = HubAddress.parse(text)
    assert (address.repo_id, address.folder, address.revision) == parts
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("user/repo", "is not an address"),
        ("hub://", "write user/repo"),
        ("hub://bert-base-uncased", "write user/repo"),
        ("hub://user/", "write user/repo"),
        ("hub:///repo", "write user/repo"),
        ("hub://../etc/last-checkpoint", "not the name of a repository"),
        ("hub://user/..", "not the name of a repository"),
        ("hub://us%2fer/repo", "not the name of a repository"),
        ("hub://user/repo/", "write last-checkpoint or checkpoint-N"),
        ("hub://user/repo/..", "write last-checkpoint or checkpoint-N"),
        ("hub://user/repo/checkpoint-", "write last-checkpoint or checkpoint-N"),
        ("hub://user/repo/checkpoint-1x", "write last-checkpoint or checkpoint-N"),
        ("hub://user/repo/checkpoint-1\n", "write last-checkpoint or checkpoint-N"),
        ("hub://user/repo/checkpoint-" + "1" * 4000, "write last-checkpoint or checkpoint-N"),
        ("hub://user/repo/last-checkpoint/../x", "no checkpoint folder"),
        ("hub://user/repo@", "not the name of a branch"),
        ("hub://user/repo@a b", "not the name of a branch"),
        ("hub://user/repo@a..b", "not the name of a branch"),
    ],
)
def test_malformed_addresses(text, problem):
    with pytest.raises(UserError, match=problem) as error:
        HubAddress.parse(text)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_what_is_meant_as_an_address():
    assert is_address("hub://x")
    assert not any(is_address(other) for other in (None, True, "runs/hub", "checkpoint-3"))
