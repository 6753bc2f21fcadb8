//! Undoes wrong decoding: UTF-8 that was read as a single-byte encoding.

use std::collections::HashSet;
use std::sync::LazyLock;

use regex::bytes::{Captures, Regex};

use super::charmap::{self, CHARMAPS, Charmap};
use super::suspicion::is_suspicious;
use super::{PASSES, until_stable};

/// UTF-8 sequences that would be valid if a blank were the byte 0xA0, limited to those
/// where that gives a likely character.
static BLANKED: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x-u) [\xc2\xc3\xc5\xce\xd0\xd9] [\ ]
        | [\xe2\xe3] [\ ] [\x80-\x84\x86-\x9f\xa1-\xbf]
        | [\xe0-\xe3] [\x80-\x84\x86-\x9f\xa1-\xbf] [\ ]
        | \xf0 [\ ] [\x80-\xbf]{2}
        | \xf0 [\x80-\xbf] [\ ] [\x80-\xbf]
        | \xf0 [\x80-\xbf]{2} [\ ]",
    )
    .expect("a constant pattern")
});

/// UTF-8 sequences (surrogate pairs included) of which a byte was lost: it became
/// [`charmap::LOST`] or a question mark.
static LOSSY: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x-u) [\xc2-\xdf] \x1a
        | [\xc2-\xc3] \?
        | \xed [\xa0-\xaf] [\x1a?] \xed [\xb0-\xbf] [\x1a?\x80-\xbf]
        | \xed [\xa0-\xaf] [\x1a?\x80-\xbf] \xed [\xb0-\xbf] [\x1a?]
        | [\xe0-\xef] [\x1a?] [\x1a\x80-\xbf]
        | [\xe0-\xef] [\x1a\x80-\xbf] [\x1a?]
        | [\xf0-\xf4] [\x1a?] [\x1a\x80-\xbf]{2}
        | [\xf0-\xf4] [\x1a\x80-\xbf] [\x1a?] [\x1a\x80-\xbf]
        | [\xf0-\xf4] [\x1a\x80-\xbf]{2} [\x1a?]
        | \x1a",
    )
    .expect("a constant pattern")
});

/// Surrogate pairs written as two three-byte sequences, and Java's two-byte NUL.
static UTF8_VARIANTS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?-u)\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]|\xc0\x80")
        .expect("a constant pattern")
});

/// Repairs a text as often as that changes it.
pub fn repair(text: String) -> String {
    until_stable(text, PASSES, |text| repair_once(&text).unwrap_or(text))
}

/// One layer of wrong decoding undone, or `None` if the text looks right or beyond help.
fn repair_once(text: &str) -> Option<String> {
    if text.is_ascii() || !is_suspicious(text) {
        return None;
    }
    let whole = CHARMAPS.iter().find_map(|map| Some(decode(map, map.encode(text)?)).flatten());
    whole
        .or_else(|| Some(repair_parts(text)).filter(|fixed| fixed != text))
        .or_else(|| latin_1_as_windows(text))
        .or_else(|| Some(super::replace_controls(text)).filter(|fixed| fixed != text))
}

/// Reads bytes as UTF-8, where need be with blanks and lost bytes put right.
fn decode(map: &Charmap, mut bytes: Vec<u8>) -> Option<String> {
    if map.blank_is_a0 && BLANKED.is_match(&bytes) {
        bytes = restore_a0(&bytes);
    }
    if map.windows {
        bytes = LOSSY.replace_all(&bytes, "\u{fffd}".as_bytes()).into_owned();
    }
    if bytes.contains(&0xed) || bytes.contains(&0xc0) {
        bytes = UTF8_VARIANTS.replace_all(&bytes, standard_sequence).into_owned();
    }
    String::from_utf8(bytes).ok()
}

/// Puts 0xA0 back where it became a blank inside of what must be a UTF-8 sequence.
fn restore_a0(bytes: &[u8]) -> Vec<u8> {
    // "à" at the end of a word lost its 0xA0 to the blank behind it: "Ã la" is "à la".
    // Before the rest of a few Portuguese words ("àquele", "às") the blank is the 0xA0.
    const CONTINUED: [&[u8]; 5] = [b" ", b"quele", b"quela", b"quilo", b"s "];
    let mut restored = Vec::with_capacity(bytes.len() + 16);
    let mut rest = bytes;
    while let Some((&byte, tail)) = rest.split_first() {
        match rest.strip_prefix(b"\xc3 ") {
            Some(after) if !CONTINUED.iter().any(|word| after.starts_with(word)) => {
                restored.extend_from_slice(b"\xc3\xa0 ");
                rest = after;
            }
            _ => {
                restored.push(byte);
                rest = tail;
            }
        }
    }
    let fill = |found: &Captures| -> Vec<u8> {
        found[0].iter().map(|&byte| if byte == b' ' { 0xa0 } else { byte }).collect()
    };
    BLANKED.replace_all(&restored, fill).into_owned()
}

/// The standard UTF-8 of a match of [`UTF8_VARIANTS`].
fn standard_sequence(found: &Captures) -> Vec<u8> {
    let &[_, a, b, _, c, d] = &found[0] else {
        return vec![0];
    };
    // Of each surrogate's 16 bits the lower 10 count.
    let bits = |byte: u8, mask: u8, shift: u32| u32::from(byte & mask) << shift;
    let code =
        0x10000 + (bits(a, 0x0f, 16) | bits(b, 0x3f, 10) | bits(c, 0x0f, 6) | bits(d, 0x3f, 0));
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER).to_string().into_bytes()
}

/// Which characters can be which byte of a misread UTF-8 sequence.
struct Roles {
    /// Lead bytes of sequences of two, three and four bytes.
    leads: [HashSet<char>; 3],
    /// Bytes that continue a sequence, and the blank.
    continuation: HashSet<char>,
    /// Of these, the ones not used as punctuation.
    strict: HashSet<char>,
}

static ROLES: LazyLock<Roles> = LazyLock::new(|| {
    let chars = |bytes: &[u8]| -> HashSet<char> {
        let every = charmap::lettered().iter();
        every.flat_map(|map| bytes.iter().map(|&byte| map.char(byte))).collect()
    };
    let range = |first: u8, last: u8| chars(&(first..=last).collect::<Vec<_>>());
    let mut continuation = range(0x80, 0xbf);
    let strict = continuation.iter().copied().filter(|c| !"–—―‘’‚“”„•…".contains(*c)).collect();
    continuation.insert(' ');
    // Of the four-byte sequences only those of 0xF0 and 0xF3 have characters assigned.
    let leads = [range(0xc2, 0xdf), range(0xe0, 0xef), chars(&[0xf0, 0xf3])];
    Roles { leads, continuation, strict }
});

/// Repairs every run of characters that are a misread UTF-8 sequence each, on its own.
fn repair_parts(text: &str) -> String {
    let mut fixed = String::with_capacity(text.len());
    let mut rest = text;
    let mut previous = None;
    while let Some(first) = rest.chars().next() {
        // Behind half a sequence, reading on would fix a few characters of a garble only.
        let may_start = previous.is_none_or(|c| !ROLES.strict.contains(&c));
        let length = if may_start { run_length(rest) } else { 0 };
        let (part, tail) = rest.split_at(length.max(first.len_utf8()));
        if length > 0 && part.len() < text.len() && is_suspicious(part) {
            fixed.push_str(&repair(part.to_owned()));
        } else {
            fixed.push_str(part);
        }
        previous = part.chars().next_back();
        rest = tail;
    }
    fixed
}

/// How many bytes of `text`, from its start, look like whole misread sequences.
fn run_length(text: &str) -> usize {
    let mut run = 0;
    loop {
        let mut chars = text[run..].chars();
        let lead = chars.next();
        let Some(extra) = ROLES.leads.iter().position(|set| lead.is_some_and(|c| set.contains(&c)))
        else {
            return run;
        };
        for _ in 0..=extra {
            if !chars.next().is_some_and(|c| ROLES.continuation.contains(&c)) {
                return run;
            }
        }
        run = text.len() - chars.as_str().len();
    }
}

/// Latin-1 with C1 controls was most likely meant to be Windows-1252.
fn latin_1_as_windows(text: &str) -> Option<String> {
    const UNASSIGNED: [u8; 5] = [0x81, 0x8d, 0x8f, 0x90, 0x9d];
    let bytes = charmap::latin_1().encode(text)?;
    if bytes.iter().any(|byte| UNASSIGNED.contains(byte)) {
        return None;
    }
    let fixed: String = bytes.iter().map(|&byte| charmap::windows_1252().char(byte)).collect();
    (fixed != text).then_some(fixed)
}
