"""Pretrain a masked language model on a text file with transformers' Trainer, and neuron recycling in three lines.

    python examples/run_mlm.py --train_file my.txt --output_dir out --max_steps 1000 \
        --recycle_steps 0.1 --recycle_start 0.1 --recycle_fraction 0.1 --recycle_immunity 2

Leave the recycling arguments out, and it trains as before.
"""

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    set_seed,
)

from hf_recycle import RecyclingArguments, RecyclingTrainer  # 1


@dataclass
class ScriptArguments:
    train_file: str = field(metadata={"help": "A text file, a paragraph a line."})
    tokenizer_name: str = field(default="bert-base-uncased", metadata={"help": "A tokenizer: of the Hub, or a folder."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a sequence."})
    hidden_size: int = field(
        default=256, metadata={"help": "Width of the model; its feed-forward layers are 4 times as wide."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the model."})


def main(words: list[str]) -> None:
    script, args = HfArgumentParser((ScriptArguments, RecyclingArguments)).parse_args_into_dataclasses(words)  # 2
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer_name)
    texts = load_dataset("text", data_files=script.train_file, split="train")
    train_dataset = texts.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=script.max_seq_length),
        batched=True,
        remove_columns=["text"],
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=script.hidden_size,
        intermediate_size=4 * script.hidden_size,
        num_hidden_layers=script.num_hidden_layers,
        num_attention_heads=max(1, script.hidden_size // 64),
        max_position_embeddings=script.max_seq_length,
    )
    trainer = RecyclingTrainer(  # 3
        model=BertForMaskedLM(config),
        args=args,
        train_dataset=train_dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
