//! Repairs broken text, as the published CLIP tokenisation does before anything else.
//!
//! It does what `fix_text` of the Python package ftfy 6 does with its default settings:
//! misread UTF-8, HTML entities, control characters, ligatures, full-width characters and
//! curly quotes are put right. The same prompt must give the same token ids, so the steps,
//! their order and their limits are those of ftfy.

mod charmap;
mod html;
mod mojibake;
mod suspicion;

use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

/// The most characters repaired at once; lines are always repaired one by one.
const SEGMENT: usize = 1_000_000;

/// How often a repair is repeated at most. Each pass undoes one layer (`&amp;amp;` has
/// two), and no honest text has this many; a hostile one would take minutes.
const PASSES: usize = 32;

/// Colour codes and other commands to a terminal.
static TERMINAL_ESCAPE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\x1b\[[\d;]*[a-zA-Z]").expect("a constant pattern"));

/// The text with everything put right that is most likely an accident.
pub fn fix_text(text: &str) -> String {
    let mut fixed = String::with_capacity(text.len());
    // A "<" says that this is HTML on purpose, from that line on.
    let mut entities = true;
    let mut rest = text;
    while !rest.is_empty() {
        let (segment, tail) = rest.split_at(segment_length(rest));
        entities &= !segment.contains('<');
        fixed.push_str(&until_stable(segment.to_owned(), PASSES, |s| fix_once(s, entities)));
        rest = tail;
    }
    fixed
}

/// The length in bytes of the first line, its end included, or of its first [`SEGMENT`]
/// characters.
fn segment_length(text: &str) -> usize {
    let line = text.find('\n').map_or(text.len(), |end| end + 1);
    text[..line].char_indices().nth(SEGMENT).map_or(line, |(end, _)| end)
}

/// Applies a step until it changes nothing, at most `passes` times.
fn until_stable(mut text: String, passes: usize, step: impl Fn(String) -> String) -> String {
    for _ in 0..passes {
        let next = step(text.clone());
        if next == text {
            break;
        }
        text = next;
    }
    text
}

/// All steps, once.
fn fix_once(mut text: String, entities: bool) -> String {
    if entities {
        text = html::unescape(&text);
    }
    if !text.is_ascii() {
        text = mojibake::repair(text);
        text = replace_controls(&text);
        text = simplify(&text);
    }
    text = text.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}'], "\n");
    text = TERMINAL_ESCAPE.replace_all(&text, "").into_owned();
    text.retain(|c| !is_junk(c));
    if text.is_ascii() { text } else { text.nfc().collect() }
}

/// C1 controls, which nobody uses on purpose, become what Windows has in their place.
fn replace_controls(text: &str) -> String {
    let windows = |c: char| match u8::try_from(c) {
        Ok(byte @ 0x80..=0x9f) => charmap::windows_1252().char(byte),
        _ => c,
    };
    text.chars().map(windows).collect()
}

/// Takes ligatures of Latin letters apart, gives full- and half-width characters their
/// usual width, and straightens quotes.
fn simplify(text: &str) -> String {
    let mut simple = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            'Ĳ' => simple.push_str("IJ"),
            'ĳ' => simple.push_str("ij"),
            'ŉ' => simple.push_str("'n"),
            'Ǳ' => simple.push_str("DZ"),
            'ǲ' => simple.push_str("Dz"),
            'ǳ' => simple.push_str("dz"),
            'Ǆ' => simple.push_str("DŽ"),
            'ǅ' => simple.push_str("Dž"),
            'ǆ' => simple.push_str("dž"),
            'Ǉ' => simple.push_str("LJ"),
            'ǈ' => simple.push_str("Lj"),
            'ǉ' => simple.push_str("lj"),
            'Ǌ' => simple.push_str("NJ"),
            'ǋ' => simple.push_str("Nj"),
            'ǌ' => simple.push_str("nj"),
            'ﬀ' => simple.push_str("ff"),
            'ﬁ' => simple.push_str("fi"),
            'ﬂ' => simple.push_str("fl"),
            'ﬃ' => simple.push_str("ffi"),
            'ﬄ' => simple.push_str("ffl"),
            'ﬅ' => simple.push_str("ſt"),
            'ﬆ' => simple.push_str("st"),
            '\u{3000}' => simple.push(' '),
            '\u{ff01}'..='\u{ffef}' => simple.extend(std::iter::once(char).nfkc()),
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => simple.push('\''),
            '\u{201c}'..='\u{201f}' => simple.push('"'),
            _ => simple.push(char),
        }
    }
    simple
}

/// Characters without a visible effect that do not belong in a text. White space and what
/// shapes its neighbours (joiners, direction marks, tags) stay.
fn is_junk(char: char) -> bool {
    matches!(
        char,
        '\0'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f'
        | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}'
    )
}

#[cfg(test)]
mod tests {
    use super::fix_text;

    #[test]
    fn accidents_are_put_right() {
        for (broken, right) in [
            ("", ""),
            ("plain text", "plain text"),
            ("e\u{301}te\u{301}", "été"),
            ("it’s “quoted”", "it's \"quoted\""),
            ("ＦＵＬＬ　ｶﾞ", "FULL ガ"),
            ("ﬁne ŉ Ǆ", "fine 'n DŽ"),
            ("\u{1b}[31mred\u{1b}[0m", "red"),
            ("a\0b\u{feff}c\x7f", "abc"),
            ("a\r\nb\rc\u{2028}d", "a\nb\nc\nd"),
            ("soft\u{ad}hyphen \u{202e}", "soft\u{ad}hyphen \u{202e}"),
        ] {
            assert_eq!(fix_text(broken), right, "{broken:?}");
        }
    }

    #[test]
    fn misread_utf8_is_read_again() {
        for (broken, right) in [
            ("cafÃ© Ã la carte", "café à la carte"),
            ("itâ€™s", "it's"),
            ("Ð¼Ð¸Ñ€", "мир"),
            ("ÃƒÂ©", "é"),
            ("ðŸ¦Š fox", "🦊 fox"),
            ("â€œlostâ€\u{fffd}", "\"lost\u{fffd}"),
            ("東京 itâ€™s", "東京 it's"),
            ("\u{ed}\u{a0}\u{bd}\u{ed}\u{b8}\u{8d}", "😍"),
            ("nul \u{c0}\u{80} Ã©", "nul  é"),
            ("caf\u{e9}\u{85}", "café…"),
            // These mean what they say.
            ("Ångström über São Paulo", "Ångström über São Paulo"),
            ("Å b", "Å b"),
        ] {
            assert_eq!(fix_text(broken), right, "{broken:?}");
        }
    }

    #[test]
    fn entities_are_resolved_unless_the_text_is_html() {
        for (broken, right) in [
            ("&lt;b&gt; &EACUTE; &#233;", "<b> É é"),
            ("&amp;amp;amp;", "&"),
            ("a<b &amp;", "a<b &amp;"),
            ("&amp;\n<b>&amp;\n&amp;", "&\n<b>&amp;\n&amp;"),
        ] {
            assert_eq!(fix_text(broken), right, "{broken:?}");
        }
    }

    #[test]
    fn many_layers_take_no_time() {
        let layers = format!("&{}", "amp;".repeat(50_000));
        assert!(fix_text(&layers).starts_with("&amp;"));
    }
}
