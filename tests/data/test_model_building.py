import pytest
import torch
from support.words import word_tokenizer

from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.model import load_model
from hf_recycle.data.overrides import parse_overrides
from hf_recycle.errors import UserError

SMALL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


@pytest.fixture
def tokenizer():
    return word_tokenizer(100)


def arguments(**changes):
    return ModelArguments(**({"model_type": "bert", "config_overrides": SMALL} | changes))


def refused(message, tokenizer, length=16, **changes):
    with pytest.raises(UserError, match=message) as caught:
        load_model(arguments(**changes), tokenizer, length)
    assert "\n" not in str(caught.value)


def test_from_scratch_takes_the_vocabulary_of_the_tokenizer(tokenizer):
    model = load_model(arguments(), tokenizer, 16)
    assert type(model).__name__ == "BertForMaskedLM"
    assert model.get_input_embeddings().weight.shape == (100, 16)
    assert model.config.pad_token_id == 0
    larger = load_model(arguments(config_overrides=f"{SMALL},vocab_size=104"), tokenizer, 16)
    assert larger.config.vocab_size == 104


@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm"])
def test_roberta_counts_positions_from_the_tokenizers_padding(tokenizer, model_type):
    model = load_model(
        arguments(model_type=model_type, config_overrides=f"{SMALL},max_position_embeddings=18"), tokenizer, 16
    )
    seen = []
    embedding = next(m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    # With the configuration's own padding id (1) the unknown word would count as padding and shift the rest.
    model(input_ids=torch.tensor([[2, 1, *range(10, 23), 3]]))
    assert seen[0].tolist() == [list(range(1, 17))]


def test_positions_grow_with_the_sequences(tokenizer):
    assert load_model(arguments(), tokenizer, 700).config.max_position_embeddings == 700
    roberta = load_model(arguments(model_type="roberta"), tokenizer, 700)
    assert roberta.config.max_position_embeddings == 701
    roberta(input_ids=torch.full((1, 700), 7))


def test_the_same_seed_gives_the_same_weights(tokenizer):
    def weights(seed):
        torch.manual_seed(seed)
        return load_model(arguments(), tokenizer, 16).get_input_embeddings().weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_continued_from_a_folder(tokenizer, tmp_path):
    model = load_model(arguments(), tokenizer, 16)
    model.save_pretrained(tmp_path)
    again = load_model(arguments(config_overrides=None, model_name_or_path=str(tmp_path)), tokenizer, 16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_causal_model(tokenizer):
    tokenizer.mask_token = None
    changes = "n_embd=16,n_layer=1,n_head=2"
    model = load_model(arguments(model_type="gpt2", config_overrides=changes, task="clm"), tokenizer, 16)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.vocab_size == 100


def test_a_tokenizer_larger_than_the_vocabulary(tokenizer):
    refused(
        "the tokenizer has 100 entries, more than the model's vocabulary of 90; .* config_overrides vocab_size=100",
        tokenizer,
        config_overrides=f"{SMALL},vocab_size=90",
    )


def test_sequences_longer_than_the_positions(tokenizer):
    refused(
        "max_seq_length=16 needs 17 positions, but the model has max_position_embeddings=16",
        tokenizer,
        model_type="roberta",
        config_overrides=f"{SMALL},max_position_embeddings=16",
    )


def test_masked_modelling_without_a_mask_token(tokenizer):
    tokenizer.mask_token = None
    refused("task='mlm' needs a tokenizer with a mask token", tokenizer)


def test_a_causal_model_is_no_masked_one(tokenizer):
    refused(
        "a gpt2 model cannot be trained with task='mlm'; try task=clm",
        tokenizer,
        model_type="gpt2",
        config_overrides="",
    )


def test_unknown_names(tokenizer, tmp_path):
    refused(r"model_type='brt' is unknown to transformers; did you mean bert\?", tokenizer, model_type="brt")
    refused("no model is named; pass model_type", tokenizer, model_type=None)
    gone = str(tmp_path / "gone")
    refused(
        "model_name_or_path='.*gone' could not be loaded", tokenizer, model_name_or_path=gone, config_overrides=None
    )
    refused("config_name='.*gone' could not be loaded", tokenizer, config_name=gone)


def test_heads_that_do_not_divide_the_width(tokenizer):
    refused("num_attention_heads=3", tokenizer, config_overrides="hidden_size=16,num_attention_heads=3")


def test_overrides_are_typed_by_the_configuration(tokenizer):
    changes = f"{SMALL}, layer_norm_eps=1e-7, hidden_dropout_prob=0, hidden_act=relu, tie_word_embeddings=false"
    config = load_model(arguments(config_overrides=changes), tokenizer, 16).config
    assert config.layer_norm_eps == 1e-7
    assert (config.hidden_dropout_prob, type(config.hidden_dropout_prob)) == (0.0, float)
    assert config.hidden_act == "relu"
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("hiden_size=16", r"a bert configuration has no hiden_size; did you mean hidden_size\?"),
        ("hidden_size=big", r"hidden_size='big' is not of the type of its default 768 \(int\)"),
        ("hidden_size=1.5", "hidden_size=1.5 is not of the type"),
        ("hidden_act=3", "hidden_act=3 is not of the type of its default 'gelu'"),
        ("hidden_size=true", "hidden_size=True is not of the type"),
        ("hidden_size", "'hidden_size' is not of the form key=value"),
        ("hidden_size=8,hidden_size=9", "sets hidden_size twice"),
    ],
)
def test_bad_overrides(tokenizer, changes, message):
    refused(message, tokenizer, config_overrides=changes)


def test_overrides_may_span_lines():
    assert parse_overrides("a=1,\n b=x , c=2e-1,") == {"a": 1, "b": "x", "c": 0.2}
