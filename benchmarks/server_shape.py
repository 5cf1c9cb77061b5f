"""A model folder for random weights that speaks: a `config.json` beside a byte-level tokenizer with as many tokens as
the model has, each some letters long, and a plain chat template. For `benchmarks/server.py`, whose chats need a
template and whose streams need text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def model_of_shape(shape: Path, folder: Path) -> Path:
    """Made in `folder`. A prompt has a token for each byte; outputs have a word for nearly each token."""
    shutil.copy(shape / "config.json", folder)
    size = json.loads((shape / "config.json").read_text())["vocab_size"]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġ{_word(number)}" for number in range(size - len(tokens))]
    tokenizer = Tokenizer(BPE({token: place for place, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _word(number: int) -> str:
    letters = ""
    while True:
        number, letter = divmod(number, 26)
        letters += chr(ord("a") + letter)
        if not number:
            return letters + "n"
