//! HTML entities that were never resolved.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::charmap;

static ENTITY: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("&(#?[0-9A-Za-z]{1,24});").expect("a constant pattern"));

/// Replaces entities by what they stand for; unknown ones stay.
pub fn unescape(text: &str) -> String {
    let resolve = |found: &Captures| -> String {
        let name = &found[1];
        let resolved = match name.strip_prefix('#') {
            Some(number) => numbered(number),
            None => named(name).or_else(|| shouted(name)),
        };
        resolved.unwrap_or_else(|| found[0].to_owned())
    };
    ENTITY.replace_all(text, resolve).into_owned()
}

/// One of the named entities of HTML 5.
fn named(name: &str) -> Option<String> {
    let chars = htmlize::ENTITIES.get(format!("&{name};").as_bytes())?;
    String::from_utf8(chars.to_vec()).ok()
}

/// A lower-case entity whose name was put in capitals with the rest of the text, such as
/// `P&EACUTE;REZ`. Names that begin like one which needs no semicolon are ambiguous.
fn shouted(name: &str) -> Option<String> {
    const AMBIGUOUS: [&str; 8] = ["AMP", "COPY", "ETH", "GT", "LT", "QUOT", "REG", "THORN"];
    let is_upper = name == name.to_ascii_uppercase();
    if !is_upper || AMBIGUOUS.iter().any(|start| name.starts_with(start)) {
        return None;
    }
    named(&name.to_ascii_lowercase()).map(|char| char.to_uppercase())
}

/// A character by its decimal or, behind an `x`, hexadecimal number.
fn numbered(number: &str) -> Option<String> {
    let (digits, radix) = match number.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (number, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    // 24 digits at most: what does not fit is far beyond the last character.
    let code = u32::from_str_radix(digits, radix).unwrap_or(u32::MAX);
    match char::from_u32(code) {
        None | Some('\0') => Some(char::REPLACEMENT_CHARACTER.to_string()),
        // An entity that stands for its own last character is left as it is.
        Some(';') => None,
        Some(c1 @ '\u{80}'..='\u{9f}') => {
            let byte = u8::try_from(c1).ok()?;
            Some(charmap::windows_1252().char(byte).to_string())
        }
        Some(char) if is_forbidden(char) => Some(String::new()),
        Some(char) => Some(char.to_string()),
    }
}

/// Controls and non-characters, which HTML drops.
fn is_forbidden(char: char) -> bool {
    matches!(char, '\x01'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f' | '\u{fdd0}'..='\u{fdef}')
        || u32::from(char) & 0xfffe == 0xfffe
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn entities_in_every_spelling() {
        for (escaped, text) in [
            ("&eacute;&Eacute;&EACUTE;&eACUTE;", "éÉÉ&eACUTE;"),
            ("&SZLIG; &HELLIP; &LTIMES;", "SS … &LTIMES;"),
            ("&NotEqualTilde;", "≂̸"),
            ("&#233;&#xE9;&#XE9;", "ééé"),
            ("&#0;&#128;&#1;&#xFFFE;|", "\u{fffd}€|"),
            ("&#xD800;&#x110000;&#999999999999999999999;", "\u{fffd}\u{fffd}\u{fffd}"),
            ("&#59;&#;&#x;&#12a;&nope;&amp", "&#59;&#;&#x;&#12a;&nope;&amp"),
        ] {
            assert_eq!(unescape(escaped), text, "{escaped:?}");
        }
    }
}
