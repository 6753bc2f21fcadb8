"""Tokenizer files for the demo model, in the published formats: CLIP's BPE (vocab.json, merges.txt), T5's unigram.

Every word of the caption grammar becomes one token; anything else falls apart into single characters.
"""

import collections
import itertools
import json
import math
import re

from data import BACKGROUND_WORDS, COLOUR_NAMES, MOTION_WORDS, SHAPE_WORDS

FILLERS = ["big", "bright", "nice", "slowly", "smoothly", "quickly", "small", "simple", "moving", "solid", "clip",
           "animation", "showing", "there", "is", "with", "and", "in", "the", "picture", "scene"]


def words():
    """All words of the grammar, the frequent ones first."""
    phrases = ["a", "an", "the", "and", "on", "over", "that", "violet", "video of", "on the left", "on the right"]
    phrases += COLOUR_NAMES + sum(SHAPE_WORDS.values(), []) + FILLERS
    phrases += list(itertools.chain(*sum(MOTION_WORDS.values(), []))) + sum(BACKGROUND_WORDS.values(), [])
    return [w for w, _ in collections.Counter(" ".join(phrases).split()).most_common()]


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 byte values, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def bpe_merges(lexicon):
    """Merge the most frequent pair (first in order on a tie) until every word is one symbol."""
    spelled = {w: list(w[:-1]) + [w[-1] + "</w>"] for w in lexicon}
    merges = []
    while True:
        pairs = collections.Counter(p for s in spelled.values() for p in zip(s, s[1:]))
        if not pairs:
            return merges
        pair = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(pair)
        for s in spelled.values():
            i = 0
            while i + 1 < len(s):
                if (s[i], s[i + 1]) == pair:
                    s[i:i + 2] = [pair[0] + pair[1]]
                i += 1


def write_clip(folder, pad):
    folder.mkdir(parents=True, exist_ok=True)
    alphabet, merges = byte_alphabet(), bpe_merges(words())
    symbols = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    symbols = list(dict.fromkeys(symbols)) + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False),
                                       encoding="utf-8")
    lines = ["#version: 0.2"] + [f"{a} {b}" for a, b in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad,
               "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    config = {"add_prefix_space": False, **special, "model_max_length": 77, "do_lower_case": True,
              "errors": "replace", "tokenizer_class": "CLIPTokenizer", "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(symbols)


def write_t5(folder):
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "</s>", "<unk>"]
    vocab = [[s, 0.0] for s in special]
    vocab += [["▁" + w, -3.0 - math.log(1 + i) / 2] for i, w in enumerate(words())]
    known = {piece for piece, _ in vocab}
    characters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-:;()&/"
    vocab += [[c, -12.0] for c in characters if c not in known]
    added = [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, s in enumerate(special)]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": space,
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end,
                                    {"Sequence": {"id": "B", "type_id": 0}}, end],
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0,
              "model_max_length": 512, "legacy": True, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({k: config[k] for k in ("eos_token", "pad_token", "unk_token")}, indent=1))
    return len(vocab)


def write_all(root):
    """Write the three tokenizer folders; returns the vocabulary sizes (CLIP, T5)."""
    clip = write_clip(root / "tokenizer", "<|endoftext|>")
    write_clip(root / "tokenizer_2", "!")
    return clip, write_t5(root / "tokenizer_3")


def add_filler(rng, text):
    """Put one word that means nothing to the data into a caption, so that such words do no harm."""
    parts = text.split()
    word = rng.choice(FILLERS) if rng.random() < 0.6 else "".join(
        rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 5)))
    parts.insert(rng.randrange(len(parts)), re.sub(r"\W", "", word))
    return " ".join(parts)
