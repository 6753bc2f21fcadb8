"""Token ids. T5 through the `tokenizers` package; CLIP by a small BPE of our own for plain English text."""

import json
import pathlib
import re

CLIP_LENGTH, T5_LENGTH = 77, 128
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)


class ClipTokenizer:
    """`vocab.json` and `merges.txt`, for text of plain ASCII (no repair of broken Unicode)."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.pad_token = config["pad_token"]
        self.start, self.end = self.vocab["<|startoftext|>"], self.vocab["<|endoftext|>"]

    def symbols(self, word):
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            rank, at = min((self.rank.get(pair, len(self.rank)), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == len(self.rank):
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def __call__(self, text):
        ids = []
        special = {"<|startoftext|>", "<|endoftext|>", self.pad_token}
        pieces = re.split("(" + "|".join(re.escape(s) for s in sorted(special)) + ")", text)
        for piece in pieces:
            if piece in special:
                ids.append(self.vocab[piece])
                continue
            for word in WORDS.findall(piece.lower()):
                ids += [self.vocab.get(s, self.end) for s in self.symbols(word)]
        ids = [self.start] + ids[:CLIP_LENGTH - 2] + [self.end]
        return ids + [self.vocab[self.pad_token]] * (CLIP_LENGTH - len(ids))


class T5Tokenizer:
    def __init__(self, folder):
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))

    def __call__(self, text):
        ids = self.inner.encode(text).ids[:-1][:T5_LENGTH - 1] + [1]
        return ids + [0] * (T5_LENGTH - len(ids))
