"""Wheels made here, with tiny models in them, become folders that transformers loads; texts are what they say."""

import io
import json
import re
import sys
from collections import Counter
from zipfile import ZipFile

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks import packaged_models
from benchmarks.packaged_models import antibodies, convert, main, reactions, vocabulary_tokenizer
from hf_recycle.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GERMLINES = {
    "V": {
        "H": {"human": {"IGHV1*01": "QV-QL", "IGHV1*02": "QVQLV"}, "rat": {"IGHV2*01": "EVQ"}},
        "K": {"mouse": {"IGKV1*01": "DI--QM"}},
        "L": {},
    },
    "J": {"H": {"human": {"IGHJ1*01": "---WGQ"}}, "K": {"mouse": {"IGKJ1*01": "FGG"}}, "L": {}},
}
ATOM = re.compile(r"Cl|Br|[BCNOSFPI]|[cnos]")


def atoms(text):
    return Counter(atom.upper() for atom in ATOM.findall(text))


def test_the_atoms_of_a_product_come_from_what_it_is_made_of():
    made = reactions(500)
    assert len(set(made)) == 500
    assert made == reactions(500)
    for reaction in made:
        before, product = reaction.split(">>")
        assert not atoms(product) - atoms(before), reaction
        assert product.count("(") == product.count(")")
        for digit in "123":
            assert len(re.findall(rf"(?<![\[+-]){digit}", product)) % 2 == 0, reaction


def test_antibodies_are_first_alleles_of_one_chain_and_species():
    assert sorted(antibodies(GERMLINES, 9)) == ["DIQMFGG", "QVQLWGQ"]


def test_text_is_cut_into_the_longest_tokens():
    tokenizer = vocabulary_tokenizer([*SPECIAL, "C", "l", "Cl", "[nH]", ">>", ">"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ClC[nH]>>x")["input_ids"])
    assert tokens == ["[CLS]", "Cl", "C", "[nH]", ">>", "[UNK]", "[SEP]"]


def wheel_with(path, folder, vocabulary, tokens, drop=()):
    """A wheel that holds a tiny BERT, whose logits are returned, with a head that a BertForMaskedLM has not."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokens), "max_position_embeddings": 32}
    model = BertForMaskedLM(BertConfig(**sizes)).eval()
    state = {name: values for name, values in model.state_dict().items() if name not in drop}
    weights = io.BytesIO()
    torch.save(state | {"cls.species.weight": torch.zeros(6, 8)}, weights)
    with ZipFile(path, "w") as file:
        file.writestr(
            f"{folder}/config.json", json.dumps(sizes | {"vocab_size": len(tokens), "max_position_embeddings": 32})
        )
        file.writestr(f"{folder}/pytorch_model.bin", weights.getvalue())
        file.writestr(vocabulary, "\n".join(tokens))
    return model


def test_the_models_of_the_wheels_compute_as_they_did(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    folder = "antiberty/trained_models/AntiBERTy_md_smooth"
    tokens = [*SPECIAL, *"ACDEFGHIKLMNPQRSTVWY"]
    antiberty = wheel_with(
        tmp_path / "wheels" / "antiberty-0.whl", folder, "antiberty/trained_models/vocab.txt", tokens
    )
    folder = "rxnfp/models/transformers/bert_pretrained"
    tokens = [*SPECIAL, *"CcNO()=1.", ">>"]
    rxnfp = wheel_with(tmp_path / "wheels" / "rxnfp-0.whl", folder, f"{folder}/vocab.txt", tokens)
    with ZipFile(tmp_path / "wheels" / "anarci-0.whl", "w") as file:
        file.writestr("anarci/germlines.py", f"all_germlines = {GERMLINES!r}")
    monkeypatch.setattr(sys, "argv", ["packaged_models", str(tmp_path / "wheels"), str(tmp_path / "models")])
    monkeypatch.setattr(packaged_models, "LINES", 4)
    main()
    for name, model in (("antiberty", antiberty), ("rxnfp", rxnfp)):
        saved = AutoModelForMaskedLM.from_pretrained(tmp_path / "models" / name).eval()
        text = (tmp_path / "models" / name / "text.txt").read_text().splitlines()[0][:20]
        ids = AutoTokenizer.from_pretrained(tmp_path / "models" / name)(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(saved(ids).logits, model(ids).logits)


def test_weights_that_lack_something_are_refused(tmp_path):
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    wheel_with(tmp_path / "some.whl", "some", "some/vocab.txt", SPECIAL, drop=(name,))
    with ZipFile(tmp_path / "some.whl") as file, pytest.raises(UserError, match=re.escape(name)):
        convert(file, "some/pytorch_model.bin", "some/vocab.txt", ["a"], tmp_path / "out")


def test_a_wheel_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["packaged_models", str(tmp_path), str(tmp_path / "models")])
    with pytest.raises(SystemExit, match="anarci"):
        main()
