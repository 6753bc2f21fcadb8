//! Does a text look like UTF-8 that was decoded as something else?
//!
//! The categories and the pairings follow the heuristic of ftfy 6 (Robyn Speer), which
//! tokenisation has to agree with: a few hundred characters occur when UTF-8 is misread,
//! and some of them hardly ever stand side by side in text that means what it says.

use std::sync::LazyLock;

use regex::Regex;

/// Character categories: name and members, in the syntax of a regular expression's class.
const CATEGORIES: &[(&str, &str)] = &[
    ("common", "\u{a0}\u{ad}·´–—―…’"),
    ("control", "\u{80}-\u{9f}"),
    ("bad", "¦¤¨¬¯¸ƒˆˇ˘˛˜†‡‰⌐◊\u{fffd}ªº"),
    ("law", "¶§"),
    ("money", "¢£¥₧€"),
    ("open", "¡«¿©΄΅‘‚“„•‹\u{f8ff}"),
    ("close", "®»˝”›™"),
    ("number", "²³¹±¼½¾×µ÷⁄∂∆∏∑√∞∩∫≈≠≡≤≥№"),
    // Letters (and the degree sign) that emoticon faces are drawn with.
    ("face", "Ò-ÖÙ-Üò-öø-üŐŌŪŲ°"),
    ("upper", "À-ÑØÜÝĂĀĄĆČĎĐĘĚĒĖĞĢİĪĶĹĽŁĻŃŇŅŒŘŚŞŠŢŤŮŰŸŹŻŽҐ"),
    ("lower", "ßà-ñăąāćčďđęěēėğģįīķĺľłļœŕśşšťüźżžґﬁﬂ"),
    // Letters that are at home at the ends of words as well.
    ("upper_word", "ÞΑ-ΩΆΈΉΊΌΎΏΪΫЁ-Я"),
    ("lower_word", "α-ωάέήίΰа-џ"),
    ("box", "│┌┐┘├┤┬┼═-╬▀▄█▌▐░▒▓"),
];

/// What hardly ever stands in a text that means what it says. `<a b>` is one character of
/// category a or b; the rest is an ordinary regular expression.
const PATTERNS: &[&str] = &[
    "<control>",
    "<bad lower upper box open close money number law><bad>",
    "<bad><lower upper box open close money number law>",
    "[a-zA-Z]<lower_word upper_word><bad>",
    "<lower lower_word box close money number><upper>",
    "<box close money number><lower>",
    "<lower box close><money>",
    r"[\s\x1c-\x1f]<upper><money>",
    "<upper box><number law>",
    "<lower upper box money close><open><number>",
    "<lower upper money number box law><close><open>",
    "<money number box><open>",
    "[a-z]<upper><open money>",
    "<box><face>",
    "<lower upper money number open close law><box>",
    "<box><close>",
    r"<lower upper><open close>[\p{L}\p{N}_]",
    "[Œœ][^A-Za-z]",
    "<upper>°",
    // Windows-1252 pairs that the categories above do not cover; Arabic needs four.
    r"[ÂÃÎÐ](?:[€œŠš¢£Ÿž\xa0\xad®©°·»–—´]|<open close>)",
    "×[²³]",
    "(?:[ØÙ](?:[ŸŠ®°µ»]|<common money bad number open>)){2}",
    "à[²µ¹¼½¾]",
    r"Ã[\xa0¡]",
    r"[a-z][\s\x1c-\x1f]?[ÃÂ][ ]",
    "^[ÃÂ][ ]",
    "(?:[a-z.,?!]|<close>)Â(?:[ ]|<open close>)",
    // Mac Roman.
    "√[±∂†≠®™´≤≥¥µø]",
    "≈[°¢]",
    "‚Ä[ìîïòôúùû†°¢π]",
    "‚[âó][àä°ê]",
    // Windows-1251, 1253 and 1257.
    "вЂ",
    "[ВГРС](?:[°µ]|<control bad open close money>)[ВГРС]",
    "ГўВЂВ.[A-Za-z ]",
    r"β€[™\xa0Ά\xad®°]",
    "[ΒΓΞΟ](?:°|<control bad open close money>)[ΒΓΞΟ]",
    "ā€",
];

/// Writes a pattern of [`PATTERNS`] as a regular expression.
fn expand(pattern: &str) -> String {
    let mut expression = String::new();
    let mut rest = pattern;
    while let Some((before, (names, after))) =
        rest.split_once('<').and_then(|(before, tail)| Some((before, tail.split_once('>')?)))
    {
        expression.push_str(before);
        expression.push('[');
        for (name, members) in CATEGORIES {
            if names.split(' ').any(|n| n == *name) {
                expression.push_str(members);
            }
        }
        expression.push(']');
        rest = after;
    }
    expression + rest
}

static SUSPICIOUS: LazyLock<Regex> = LazyLock::new(|| {
    let patterns: Vec<String> = PATTERNS.iter().map(|p| expand(p)).collect();
    Regex::new(&patterns.join("|")).expect("a constant pattern")
});

/// Whether some characters of this text stand side by side as they do in misread UTF-8.
pub fn is_suspicious(text: &str) -> bool {
    SUSPICIOUS.is_match(text)
}
