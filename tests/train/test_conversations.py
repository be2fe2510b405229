"""Conversations become rows of whole documents that are learnt where they should be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, strategies as st

from train.chat_template import Chat
from train.config import DataConfig
from train.data.corpus import Corpus, Lesson, hash_of
from train.data.packing import PackedRows, best_fit
from train.data.text import cut_report, load_text, shuffled_rows
from train.data.vocabulary import Vocabulary

pytest.importorskip("jinja2")

SPECIAL = ["<s>", "</s>", "<turn>", "<end>"]
# As most templates of the hub: turns, each with its end and a new line.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Only the last turn has its thoughts, as with Qwen3.
FORGETFUL = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<s></s>{% endif %}"
    "{{ m['content'] }}",
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant: "
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}"
    "{{ m['role'] }}: {{ m['content'] }}{% endif %}\n{% endfor %}"
)
UNSTEADY = "{{ messages | length }}{{ add_generation_prompt }}"
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "two é?"},
    {"role": "assistant", "content": "BC"},
]


def letters() -> Vocabulary:
    """A tokenizer of letters, and of pairs of some of them."""
    words = [*SPECIAL, *map(chr, range(32, 127)), "\n", "é", "BC", "t\n"]
    model = tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [("B", "C"), ("t", "\n")]
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return Vocabulary(tokenizer, "letters", "letters")


def write(folder: Path, *lines: Any, name: str = "talk.jsonl") -> Path:
    path = folder / name
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def load(
    path: Path,
    template: str | None = PLAIN,
    vocabulary: Vocabulary | None = None,
    **options: Any,
) -> Corpus:
    chat = Chat(template, {"bos_token": "<s>", "eos_token": "</s>"}, "folder")
    config = DataConfig(path, **options)
    (corpus,) = load_text(config, vocabulary or letters(), chat).corpora
    return corpus


def learnt(corpus: Corpus, vocabulary: Vocabulary | None = None) -> list[list[str]]:
    """The texts that are learnt of each document."""
    vocabulary, found = vocabulary or letters(), []
    for start, length in zip(corpus.starts, corpus.lengths, strict=True):
        mask = corpus.learnt(start, start + length)
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        ids = corpus.window(start, start + length)
        parts = [ids[a:b] for a, b in edges.reshape(-1, 2)]
        tokenizer = vocabulary.tokenizer
        found.append(
            [
                vocabulary.decode(part)
                if tokenizer is None
                else tokenizer.decode(part.tolist(), skip_special_tokens=False)
                for part in parts
            ]
        )
    return found


def test_answers_are_learnt_with_the_token_that_ends_them(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TALK}, "", {"messages": TALK[:2]})
    assert learnt(load(path)) == [["A<end>", "BC<end>"], ["A<end>"]]
    # Bytes have no token that ends a turn, only the text that does.
    assert learnt(load(path, vocabulary=Vocabulary()), Vocabulary())[0] == [
        "A<end>\n",
        "BC<end>\n",
    ]


def test_marks_of_a_template_are_used(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TALK})
    assert learnt(load(path, MARKED)) == [["A<end>", "BC<end>"]]
    assert Chat(MARKED).prompt(TALK[:2]) == "user: one?assistant: A<end>"


def test_answers_that_a_template_rewrites_are_documents_of_their_own(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, {"messages": TALK})
    corpus = load(path, FORGETFUL)
    assert learnt(corpus) == [["<s></s>A<end>"], ["<s></s>BC<end>"]]
    # They are held out together.
    assert corpus.hashes[0] == corpus.hashes[1]
    second = corpus.window(int(corpus.starts[1]), corpus.size)
    chat = Chat(FORGETFUL, {"bos_token": "<s>"})
    asked = letters().encode(chat.prompt(TALK[:3]).encode(), special=False)
    np.testing.assert_array_equal(second[: asked.size], asked)


def test_lessons_are_the_same_every_day(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    path = write(tmp_path, {"messages": TALK})
    corpus = load(path, dated)
    assert letters().decode(corpus.window(0, 11)) == "26 Jul 2024"
    assert not Chat(dated).prompt(TALK).startswith("26 Jul 2024")


def test_a_token_that_reaches_into_an_answer_is_learnt(tmp_path: Path) -> None:
    # "t" of the prompt and the answer's new line are one token.
    template = PLAIN.replace("<turn>assistant\n", "<turn>assistant").replace(
        "{{ m['role'] }}\n", "{{ m['role'] }}"
    )
    path = write(
        tmp_path, {"messages": [TALK[0], {"role": "assistant", "content": "\nx"}]}
    )
    assert learnt(load(path, template)) == [["t\nx<end>"]]


def test_completions_are_learnt_with_the_end_of_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "two é?", "completion": "BC"})
    assert learnt(load(path)) == [["BC</s>"]]
    corpus = load(path, vocabulary=Vocabulary())
    assert learnt(corpus, Vocabulary()) == [["BC"]] and corpus.size == 9


def test_the_form_is_that_of_the_first_line_unless_given(tmp_path: Path) -> None:
    both = write(tmp_path, {"text": "abc", "messages": TALK})
    with pytest.raises(ValueError, match=r"jsonl:1 has the fields of text and message"):
        load(both)
    assert not load(both, form="text").is_taught
    assert load(both, form="messages").is_taught
    assert load(both, text_field="body").is_taught
    other = write(tmp_path, {"text": "abc"}, name="a.jsonl")
    assert not load(other).is_taught


CASES: dict[str, tuple[Any, str | None, str]] = {
    "no messages": ({"messages": []}, PLAIN, "has no list of messages in 'messages'"),
    "no role": (
        {"messages": [{"content": "x"}]},
        PLAIN,
        "has a message without a role: message 1 is",
    ),
    "no answer": ({"messages": TALK[:1]}, PLAIN, "has no answer to learn"),
    "no JSON": ("{", PLAIN, "is not JSON"),
    "other form": ({"prompt": "x"}, PLAIN, "has no list of messages in 'messages', on"),
    "no template": ({"messages": TALK}, None, "the model has no chat template"),
    "unsteady": ({"messages": TALK}, UNSTEADY, "of folder does not continue its own"),
    "no characters": (
        {"messages": [{"role": "assistant", "content": "\ufdd0"}]},
        PLAIN,
        "which are no characters",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, template, message = CASES[case]
    path = write(tmp_path, {"messages": TALK} if template == PLAIN else "", line)
    with pytest.raises(ValueError, match=rf"talk\.jsonl:\d .*{message}"):
        load(path, template)


def test_completions_need_two_texts(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "x", "completion": ["y"]})
    with pytest.raises(ValueError, match=r"jsonl:1 has no texts in 'prompt' and 'comp"):
        load(path)
    path = write(tmp_path, {"prompt": "x", "completion": ""})
    with pytest.raises(ValueError, match=r"jsonl:1 has an empty completion"):
        load(path)
    write(tmp_path, "text", name="z.txt")
    path = write(tmp_path, {"prompt": "x", "completion": "y"})
    with pytest.raises(ValueError, match=r"z\.txt is not a \.jsonl file"):
        load(tmp_path)


def lessons_of(sizes: list[tuple[int, int]]) -> Corpus:
    """Documents of (prompt, answer) lengths, whose tokens count through the corpus."""
    first, lessons = 0, []
    for asked, answer in sizes:
        tokens = np.arange(first, first + asked + answer, dtype=np.int32)
        lessons.append(Lesson(tokens, np.arange(tokens.size) >= asked, hash_of(b"")))
        first += tokens.size
    return Corpus.of_lessons(lessons)


SIZES = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=12
)


@given(SIZES, st.integers(8, 20))
def test_rows_hold_whole_documents_and_learn_only_answers(
    sizes: list[tuple[int, int]], length: int
) -> None:
    corpus = lessons_of(sizes)
    rows = PackedRows.of(corpus, length)
    seen = []
    for row in (rows[index] for index in range(len(rows))):
        assert all(x.shape == (length,) and x.dtype == np.int32 for x in row.values())
        for number in range(row["segment_ids"].max() + 1):
            tokens = row["tokens"][row["segment_ids"] == number]
            labels = row["labels"][row["segment_ids"] == number]
            document = int(np.searchsorted(corpus.starts, tokens[0]))
            seen.append(document)
            asked, answer = sizes[document]
            start, whole = corpus.starts[document], min(asked + answer, length)
            np.testing.assert_array_equal(tokens, start + np.arange(whole))
            # The token before each of the answer's, and no other.
            following = np.arange(1, whole + 1)
            is_learnt = (following >= asked) & (following < whole)
            expected = np.where(is_learnt, start + following, -1)
            np.testing.assert_array_equal(labels, expected)
        assert (row["labels"][row["segment_ids"] < 0] == -1).all()
    fits = [number for number, (asked, _) in enumerate(sizes) if asked < length]
    assert sorted(seen) == fits
    assert rows.cut == sum(a + b > length for a, b in sizes if a < length)
    assert rows.unlearnt == len(sizes) - len(fits)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=40))
def test_rows_are_as_full_as_best_fit_leaves_them(lengths: list[int]) -> None:
    bins = best_fit(np.array(lengths), 10)
    filled = [sum(lengths[item] for item in items) for items in bins]
    assert sorted(np.concatenate(bins)) == list(range(len(lengths)))
    assert max(filled) <= 10
    # No two bins fit into one.
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > 10


def test_what_is_too_long_is_counted() -> None:
    rows = PackedRows.of(lessons_of([(2, 3), (2, 9), (9, 2)]), 8)
    assert (rows.cut, rows.unlearnt) == (1, 1)
    assert str(cut_report([rows])).startswith(
        "warning: of 3 conversations, 1 are longer than sequence_length=8 and lose "
        "their ends, and 1 are left out"
    )
    assert cut_report([PackedRows.of(lessons_of([(2, 3)]), 8)]) is None
    with pytest.raises(ValueError, match="sequence_length=2 leaves nothing to learn"):
        PackedRows.of(lessons_of([(2, 3)]), 2)


def test_conversations_are_held_out_and_mixed_with_text(tmp_path: Path) -> None:
    talks = [
        {"messages": [TALK[0], {"role": "assistant", "content": f"number {i}"}]}
        for i in range(40)
    ]
    path = write(tmp_path, *talks)
    other = write(tmp_path, {"text": "a text " * 40}, name="text.jsonl")
    chat = Chat(PLAIN, {"bos_token": "<s>"})
    held = load_text(DataConfig(path, eval_fraction=0.3), letters(), chat)
    parts = [learnt(part) for part in (*held.corpora, *held.held_out)]
    assert sorted(parts[0] + parts[1]) == sorted(learnt(load(path)))
    assert 4 < len(parts[1]) < 20
    mixed = DataConfig(mixture=((path, 0.5), (other, 0.5)))
    text = load_text(mixed, letters(), chat)
    rows = shuffled_rows(text.rows(64), text.weights, seed=1)
    found = [rows[i] for i in range(20)]
    # Text is learnt from its first token on, and conversations are not.
    from_text = [row["labels"][0] >= 0 for row in found]
    assert 5 <= sum(from_text) <= 15


def test_the_mask_is_part_of_what_identifies_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TALK})
    taught = load(path)
    plain = Corpus.of(list(taught.documents()))
    assert taught.facts["tokens"] == plain.facts["tokens"]
    assert taught.facts["sha256"] != plain.facts["sha256"]
