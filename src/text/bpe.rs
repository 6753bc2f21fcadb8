//! Byte-pair encoding of one word.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, HashMap};

use crate::{Error, Result};

/// What marks the last symbol of a word.
const WORD_END: &str = "</w>";

/// A vocabulary and its merges.
///
/// A symbol is a number: below `unknown_from` the token id of a vocabulary entry, from
/// there on a string that only the merges know.
pub struct Bpe {
    symbols: HashMap<String, u32>,
    unknown_from: u32,
    /// The symbols of single bytes inside of a word, and at its end.
    bytes: [[u32; 256]; 2],
    /// What two neighbours become, and how early.
    merges: HashMap<(u32, u32), Merge>,
}

/// One line of merges.txt.
#[derive(Debug, Clone, Copy)]
struct Merge {
    rank: u32,
    result: u32,
}

/// One token of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its id, or `None` if the vocabulary lacks it.
    pub id: Option<u32>,
    /// How many bytes of the word it covers.
    pub bytes: usize,
}

impl Bpe {
    /// From the entries of vocab.json and the text of merges.txt, whose first line is a
    /// version.
    ///
    /// # Errors
    /// A line that is not two symbols, or a token id too large to be one.
    pub fn new(vocabulary: HashMap<String, u32>, merges: &str) -> Result<Self> {
        let largest = vocabulary.values().copied().max().unwrap_or(0);
        let unknown_from = largest
            .checked_add(1)
            .filter(|&first| first < u32::MAX / 2)
            .ok_or_else(|| Error::model(format!("vocab.json has a token id of {largest}")))?;
        let mut bpe =
            Bpe { symbols: vocabulary, unknown_from, bytes: [[0; 256]; 2], merges: HashMap::new() };
        for byte in 0..=255 {
            let char = byte_char(byte);
            bpe.bytes[0][usize::from(byte)] = bpe.intern(char.to_string());
            bpe.bytes[1][usize::from(byte)] = bpe.intern(format!("{char}{WORD_END}"));
        }
        for (rank, line) in (0..).zip(merges.trim().lines().skip(1)) {
            let mut parts = line.split_whitespace();
            let (Some(first), Some(second), None) = (parts.next(), parts.next(), parts.next())
            else {
                let number = rank + 2;
                return Err(Error::model(format!(
                    "line {number} of merges.txt is not two symbols"
                )));
            };
            let result = bpe.intern(format!("{first}{second}"));
            let pair = (bpe.intern(first.to_owned()), bpe.intern(second.to_owned()));
            bpe.merges.insert(pair, Merge { rank, result });
        }
        Ok(bpe)
    }

    /// The number of a symbol, a new one if it has none.
    fn intern(&mut self, symbol: String) -> u32 {
        // Fewer than 2^31 symbols fit into any memory, so the numbers do not run out.
        let next = self.unknown_from + self.symbols.len() as u32;
        *self.symbols.entry(symbol).or_insert(next)
    }

    /// The token id of a vocabulary entry.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.symbols.get(token).copied().and_then(|symbol| self.known(symbol))
    }

    fn known(&self, symbol: u32) -> Option<u32> {
        (symbol < self.unknown_from).then_some(symbol)
    }

    /// Splits a word into tokens: of all neighbours that merge, the pair with the lowest
    /// rank is merged wherever it stands, from left to right, until none is left.
    pub fn encode(&self, word: &str) -> Vec<Piece> {
        let mut chain = Chain::new(self, word.as_bytes());
        let mut queue: BinaryHeap<Reverse<(u32, usize)>> = (0..word.len())
            .filter_map(|at| Some(Reverse((chain.merge_at(at)?.rank, at))))
            .collect();
        let mut created = Vec::new();
        while let Some(&Reverse((rank, _))) = queue.peek() {
            // One round: pairs that it creates have to wait for the next.
            while let Some(top) = queue.peek_mut().filter(|top| top.0.0 == rank) {
                let Reverse((_, at)) = PeekMut::pop(top);
                if let Some(merge) = chain.merge_at(at).filter(|m| m.rank == rank) {
                    chain.apply(at, merge);
                    created.extend(chain.links[at].previous);
                    created.push(at);
                }
            }
            let ranked = created.drain(..).filter_map(|at| Some((chain.merge_at(at)?.rank, at)));
            queue.extend(ranked.map(Reverse));
        }
        chain.pieces()
    }
}

/// The symbols of a word under way, each at the position of its first byte.
struct Chain<'a> {
    bpe: &'a Bpe,
    links: Vec<Link>,
}

#[derive(Clone, Copy)]
struct Link {
    /// The symbol; `None` once it has become part of the one before it.
    symbol: Option<u32>,
    previous: Option<usize>,
    /// Where the symbol ends, which is where the next begins.
    end: usize,
}

impl<'a> Chain<'a> {
    fn new(bpe: &'a Bpe, word: &[u8]) -> Self {
        let link = |(at, &byte): (usize, &u8)| Link {
            symbol: Some(bpe.bytes[usize::from(at + 1 == word.len())][usize::from(byte)]),
            previous: at.checked_sub(1),
            end: at + 1,
        };
        Chain { bpe, links: word.iter().enumerate().map(link).collect() }
    }

    /// What the symbol at `at` and the next one become, if they merge.
    fn merge_at(&self, at: usize) -> Option<Merge> {
        let link = self.links[at];
        let next = self.links.get(link.end)?;
        self.bpe.merges.get(&(link.symbol?, next.symbol?)).copied()
    }

    fn apply(&mut self, at: usize, merge: Merge) {
        let next = self.links[at].end;
        let end = self.links[next].end;
        self.links[next].symbol = None;
        self.links[at] = Link { symbol: Some(merge.result), end, ..self.links[at] };
        if let Some(after) = self.links.get_mut(end) {
            after.previous = Some(at);
        }
    }

    fn pieces(&self) -> Vec<Piece> {
        let whole = self.links.iter().enumerate().filter_map(|(at, link)| {
            Some(Piece { id: self.bpe.known(link.symbol?), bytes: link.end - at })
        });
        whole.collect()
    }
}

/// The character that stands for a byte in GPT-2's files: itself if it is printable
/// Latin-1, else the next free one from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(0x100 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(merges: &str) -> Bpe {
        let entries = ["a", "b</w>", "ab", "ab</w>", "aa", "a</w>", "abab</w>"];
        let vocabulary = entries.iter().map(|e| e.to_string()).zip(0..).collect();
        Bpe::new(vocabulary, merges).unwrap()
    }

    fn ids(bpe: &Bpe, word: &str) -> Vec<Option<u32>> {
        bpe.encode(word).iter().map(|piece| piece.id).collect()
    }

    #[test]
    fn bytes_have_the_characters_of_gpt_2() {
        assert_eq!(['!', '~', 'Ā', 'Ġ', 'ġ', 'ÿ'], [33, 126, 0, 32, 127, 255].map(byte_char));
        assert_eq!('Ń', byte_char(0xad));
    }

    #[test]
    fn pairs_merge_by_rank_and_from_the_left() {
        let bpe = tiny("#version\na a\na b</w>\na b\nab ab</w>");
        assert_eq!(ids(&bpe, "ab"), [Some(3)]);
        assert_eq!(ids(&bpe, "abab"), [Some(6)]);
        assert_eq!(ids(&bpe, "aaab"), [Some(4), Some(3)]);
        assert_eq!(ids(&bpe, "aaaa"), [Some(4), Some(0), Some(5)]);
        assert_eq!(ids(&bpe, "x"), [None]);
        assert_eq!(ids(&bpe, ""), []);
        let lengths: usize = bpe.encode("xaabé").iter().map(|piece| piece.bytes).sum();
        assert_eq!(lengths, "xaabé".len());
    }

    #[test]
    fn a_broken_line_is_named() {
        let vocabulary = HashMap::from([("a".to_owned(), 0)]);
        let error = Bpe::new(vocabulary, "#version\na b\na\n").err().unwrap();
        assert!(error.to_string().contains("line 3"), "{error}");
        let vocabulary = HashMap::from([("a".to_owned(), u32::MAX)]);
        assert!(Bpe::new(vocabulary, "#version").is_err());
    }
}
