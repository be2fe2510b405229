"""The files next to a model's weights that programs need to serve it.

A run that began from a folder has that folder's; another one those next to its
tokenizer.json. What is missing is made from the tokenizer. Bytes become a tokenizer
whose 256 tokens are the bytes.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from train.data.vocabulary import Vocabulary

NAMES = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def serving_files(
    vocabulary: Vocabulary, folders: Sequence[Path], length: int
) -> dict[str, str]:
    """Returns the contents of files by name.

    Args:
      vocabulary: text to token ids and back.
      folders: folders that may have some of the files; the first is preferred.
      length: the longest text of the model in tokens.
    """
    files: dict[str, str] = {}
    for folder, name in itertools.product(reversed(folders), NAMES):
        if (folder / name).exists():
            files[name] = (folder / name).read_text(encoding="utf-8")
    tokenizer = vocabulary.tokenizer or byte_tokenizer()
    before, after = vocabulary.around()
    ids = {"bos": before[:1], "eos": after[-1:]}
    own = {name: found[0] for name, found in ids.items() if found}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.id_to_token(id_) for name, id_ in own.items()},
    }
    generation = {
        "bos_token_id": own.get("bos"),
        "eos_token_id": own.get("eos"),
        "do_sample": True,
    }
    made = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    return {**made, **files}


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose token ids are the bytes of a text."""
    tokenizer = Tokenizer(models.BPE(vocab=_letters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> dict[str, int]:
    """The byte for each of the letters by which the library writes bytes.

    Visible bytes are their own letters, and the others those from 256 on.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + i): byte for i, byte in enumerate(hidden)}
