"""Files that stand for a reader's own, so that the commands of the pages run.

A text and a tokenizer for it, conversations, and a tiny model in place of Qwen3-0.6B.
"""

import json
from pathlib import Path

import tokenizers
from flax import nnx

from usp_jax.models import hf
from usp_jax.models.llama import Llama, LlamaConfig

TEXT = "a line of text, long enough to train on\n" * 4000
TALKS = {
    "What is a ring?": "Devices that pass keys around.",
    "What is Ulysses?": "Two exchanges of heads.",
    "Which one first?": "Ulysses, within a node.",
}
START, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of the kind of Qwen3-0.6B.
MODEL = LlamaConfig(
    vocab_size=384,
    d_model=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    d_ff=128,
    qk_norm=True,
    dtype="bfloat16",
)


def write_files(folder: Path) -> None:
    """Writes the files into a folder, such as a clone."""
    for name in ("my_texts", "texts", "code", "notes"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text(TEXT)
    (folder / "essay.txt").write_text(TEXT[:400])
    (folder / "prose.jsonl").write_text("\n".join([json.dumps({"text": TEXT})] * 4))
    _write_lines(folder / "talks.jsonl")
    words = [TEXT, *TALKS, *TALKS.values(), "user assistant"]
    _tokenizer(words).save(str(folder / "tokenizer.json"))
    write_model(folder / "Qwen3-0.6B", words)


def write_model(folder: Path, words: list[str]) -> None:
    """Writes a random chat model in the Hugging Face format."""
    model = Llama(MODEL, rngs=nnx.Rngs(0))
    # Frozen random matrices of the usual size could not make any token likely.
    model.embed[...] *= 30
    model.lm_head[...] *= 30
    hf.save(model, folder)
    _tokenizer(words).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "pad_token": START, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_lines(path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for talk in TALKS.items()
        for role, text in zip(("user", "assistant"), talk, strict=True)
    ]
    lines = [json.dumps({"messages": turns[: 2 * n]}) for n in (1, 2, 3)]
    path.write_text("\n".join(8 * lines))


def _tokenizer(words: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer of bytes and their merges, as Qwen's is."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=[START, TURN, END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer
