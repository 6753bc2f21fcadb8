//! The single-byte encodings that text is most often wrongly decoded with.

use std::sync::LazyLock;

use encoding_rs::{
    Encoding, ISO_8859_2, MACINTOSH, WINDOWS_1250, WINDOWS_1251, WINDOWS_1252, WINDOWS_1253,
    WINDOWS_1254, WINDOWS_1257,
};

/// What the bytes 0x80..=0xFF mean on the first IBM PC.
const CODE_PAGE_437: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐\
    └┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// The byte (SUBSTITUTE) that stands for a character lost in an earlier conversion.
pub const LOST: u8 = 0x1a;

/// One single-byte encoding; below 0x80 all of them are ASCII.
pub struct Charmap {
    /// The characters of the bytes 0x80..=0xFF.
    upper: [char; 128],
    /// The same as (character, byte), sorted by character.
    bytes: Vec<(char, u8)>,
    /// Windows software passes unassigned bytes through as C1 control characters and
    /// writes U+FFFD where it lost one: such an encoding maps U+FFFD to [`LOST`].
    pub windows: bool,
    /// Whether a blank may stand for a no-break space (in Mac Roman that byte is a dagger).
    pub blank_is_a0: bool,
}

impl Charmap {
    /// An encoding from what its bytes 0x80..=0xFF mean.
    fn new(char_of: impl Fn(u8) -> char) -> Self {
        let upper: [char; 128] = std::array::from_fn(|i| char_of(0x80 | i as u8));
        let mut bytes: Vec<_> = upper.into_iter().zip(0x80..=0xff).collect();
        bytes.sort_unstable();
        Charmap { upper, bytes, windows: false, blank_is_a0: true }
    }

    /// An encoding by its table in `encoding_rs`, with unassigned bytes passed through.
    fn standard(encoding: &'static Encoding) -> Self {
        Self::new(|byte| {
            let one = [byte];
            let decoded = encoding.decode_without_bom_handling_and_without_replacement(&one);
            decoded.and_then(|s| s.chars().next()).unwrap_or(char::from(byte))
        })
    }

    fn windows(encoding: &'static Encoding) -> Self {
        Charmap { windows: true, ..Self::standard(encoding) }
    }

    /// The character of a byte.
    pub fn char(&self, byte: u8) -> char {
        match byte.checked_sub(0x80) {
            Some(upper) => self.upper[usize::from(upper)],
            None => char::from(byte),
        }
    }

    /// The bytes this text would have been decoded from, if it can have been.
    pub fn encode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.byte(c)).collect()
    }

    fn byte(&self, char: char) -> Option<u8> {
        match char {
            char::REPLACEMENT_CHARACTER if self.windows => Some(LOST),
            '\u{1a}' if self.windows => None,
            '\0'..='\x7f' => u8::try_from(char).ok(),
            _ => {
                let at = self.bytes.binary_search_by_key(&char, |&(c, _)| c).ok()?;
                Some(self.bytes[at].1)
            }
        }
    }
}

/// All encodings, the likeliest first; the first seven put letters where UTF-8 has its
/// lead bytes.
pub static CHARMAPS: LazyLock<Vec<Charmap>> = LazyLock::new(|| {
    let page_437: Vec<char> = CODE_PAGE_437.chars().collect();
    vec![
        Charmap::new(char::from),
        Charmap::windows(WINDOWS_1252),
        Charmap::windows(WINDOWS_1251),
        Charmap::windows(WINDOWS_1250),
        Charmap::windows(WINDOWS_1253),
        Charmap::windows(WINDOWS_1254),
        Charmap::windows(WINDOWS_1257),
        Charmap::standard(ISO_8859_2),
        Charmap { blank_is_a0: false, ..Charmap::standard(MACINTOSH) },
        Charmap::new(|byte| page_437[usize::from(byte - 0x80)]),
    ]
});

/// Latin-1, which maps every byte to the code point of the same number.
pub fn latin_1() -> &'static Charmap {
    &CHARMAPS[0]
}

/// Windows-1252, with its five unassigned bytes passed through.
pub fn windows_1252() -> &'static Charmap {
    &CHARMAPS[1]
}

/// The encodings whose letters look like UTF-8 lead bytes.
pub fn lettered() -> &'static [Charmap] {
    &CHARMAPS[..7]
}
