//! Token ids against those of the published Python tokenizers.

mod common;

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use pyraflow::ErrorKind;
use pyraflow::text::{CLIP_LENGTH, ClipTokenizer, T5_LENGTH, T5Tokenizer, Tokens};
use serde_json::Value;

/// One tokenizer of either kind.
enum Tokenizer {
    Clip(Box<ClipTokenizer>),
    T5(Box<T5Tokenizer>),
}

/// The tokenizers of both model families in a folder with a checkpoint of each, under the
/// names that tokens.json has for them; those that are there.
struct Tokenizers(Vec<(&'static str, Tokenizer)>);

impl Tokenizers {
    fn load(folder: &Path) -> Self {
        let places = [
            ("clip_l", "sd3/tokenizer"),
            ("clip_g", "sd3/tokenizer_2"),
            ("clip_flux", "flux/tokenizer"),
            ("t5", "sd3/tokenizer_3"),
            ("t5_flux", "flux/tokenizer_2"),
        ];
        let there = places.into_iter().filter(|(_, path)| folder.join(path).exists());
        let load = |(name, path): (&'static str, &str)| {
            let path = folder.join(path);
            let tokenizer = if name.starts_with("t5") {
                Tokenizer::T5(Box::new(T5Tokenizer::from_dir(path).unwrap()))
            } else {
                Tokenizer::Clip(Box::new(ClipTokenizer::from_dir(path).unwrap()))
            };
            (name, tokenizer)
        };
        Tokenizers(there.map(load).collect())
    }

    /// The tokens of a prompt by each tokenizer.
    fn encode(&self, prompt: &str) -> Vec<(&'static str, Tokens)> {
        let encode = |tokenizer: &Tokenizer| match tokenizer {
            Tokenizer::Clip(clip) => clip.encode(prompt),
            Tokenizer::T5(t5) => t5.encode(prompt).unwrap(),
        };
        self.0.iter().map(|(name, tokenizer)| (*name, encode(tokenizer))).collect()
    }
}

/// Those of the goldens in the repository.
static GOLDEN: LazyLock<Tokenizers> = LazyLock::new(|| {
    let all = Tokenizers::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"));
    assert_eq!(all.0.len(), 5);
    all
});

/// The ids that tokens.json has for a tokenizer: its own, or those it agrees with.
fn expected(entry: &Value, name: &str) -> Option<Vec<u32>> {
    let other = if name.starts_with("t5") { "t5" } else { "clip_l" };
    let ids = entry.get(name).or(entry.get(other))?.as_array()?;
    Some(ids.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect())
}

fn entries(folder: &Path) -> Vec<Value> {
    let path = folder.join("tokens.json");
    let entries: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(!entries.is_empty());
    entries
}

#[test]
fn golden_ids_are_equal_with_their_padding() {
    let folder = common::goldens();
    if !folder.join("tokens.json").exists() {
        println!("skipped: {} holds no tokens.json", folder.display());
        return;
    }
    let tokenizers = Tokenizers::load(&folder);
    let mut compared = 0;
    for entry in entries(&folder) {
        let prompt = entry["prompt"].as_str().unwrap();
        for (name, tokens) in tokenizers.encode(prompt) {
            let Some(ids) = expected(&entry, name) else { continue };
            assert_eq!(tokens.ids, ids, "{name} of {prompt:?}");
            compared += 1;
            if let (true, Some(_)) = (name == "t5", entry.get("t5_mask")) {
                let mask: Vec<u32> = (0..T5_LENGTH).map(|i| u32::from(i < tokens.len)).collect();
                assert_eq!(Some(mask), expected(&entry, "t5_mask"), "mask of {prompt:?}");
            }
        }
    }
    assert!(compared > 0, "{} has no tokenizer for its tokens.json", folder.display());
}

#[test]
fn ids_of_the_published_vocabularies_are_equal() {
    let Some(folder) = common::vocabularies() else {
        println!("skipped: PYRAFLOW_VOCABULARIES names no folder");
        return;
    };
    let start = Instant::now();
    let tokenizers = Tokenizers::load(&folder);
    println!("five tokenizers loaded in {:?}", start.elapsed());
    let mut wrong = Vec::new();
    for entry in entries(&folder) {
        let prompt = entry["prompt"].as_str().unwrap();
        for (name, tokens) in tokenizers.encode(prompt) {
            let Some(expected) = expected(&entry, name) else { continue };
            let end = *expected.last().unwrap();
            let first_end = tokens.ids.iter().position(|&id| id == end).map(|at| at + 1);
            let is_whole = expected.len() == tokens.len || Some(expected.len()) == first_end;
            if !is_whole || !tokens.ids.starts_with(&expected) {
                wrong.push(format!("{name} of {prompt:?}\n  {expected:?}\n  {:?}", tokens.ids));
            }
        }
    }
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// What has to hold for any text.
fn check_form(name: &str, tokens: &Tokens) {
    let length = if name.starts_with("t5") { T5_LENGTH } else { CLIP_LENGTH };
    assert_eq!(tokens.ids.len(), length, "{name}");
    assert!((1..=length).contains(&tokens.len), "{name}");
    let padding = &tokens.ids[tokens.len..];
    assert!(padding.windows(2).all(|pair| pair[0] == pair[1]), "{name}");
    if let Some(lost) = &tokens.lost {
        assert!(tokens.len == length && !lost.trim().is_empty(), "{name} lost {lost:?}");
    }
}

#[test]
fn what_is_cut_off_is_shown() {
    let prompt = format!("{}The END.", "a ".repeat(200));
    for (name, tokens) in GOLDEN.encode(&prompt) {
        check_form(name, &tokens);
        let lost = tokens.lost.expect(name);
        assert!(lost.to_lowercase().ends_with(" a the end."), "{name}: {lost:?}");
        // What is left of the prompt gives the same ids, and nothing of it is lost.
        let kept = prompt.len() - lost.len();
        assert_eq!(encode_as(name, &prompt[..kept]), Tokens { lost: None, ..tokens }, "{name}");
    }
    for (name, tokens) in GOLDEN.encode("a fox") {
        assert_eq!(tokens.lost, None, "{name}");
    }
}

fn encode_as(name: &str, prompt: &str) -> Tokens {
    GOLDEN.encode(prompt).into_iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn hostile_prompts_are_encoded_in_little_time() {
    let megabyte = 1 << 20;
    let prompts = [
        "\0".to_owned(),
        "word ".repeat(megabyte / 5),
        "a".repeat(megabyte),
        "!".repeat(megabyte),
        " ".repeat(megabyte),
        "\n".repeat(megabyte),
        "👨\u{200d}👩\u{200d}👧".repeat(megabyte / 18),
        "e\u{301}\u{302}".repeat(megabyte / 5),
        "Ã".repeat(megabyte / 2),
        "â€™".repeat(megabyte / 8),
        "&amp;".repeat(megabyte / 5),
        format!("&{}", "amp;".repeat(megabyte / 4)),
        "雪".repeat(megabyte / 3),
        "<|endoftext|>".repeat(megabyte / 13),
    ];
    for prompt in prompts {
        let start = Instant::now();
        for (name, tokens) in GOLDEN.encode(&prompt) {
            check_form(name, &tokens);
        }
        // It takes well under a second each; work that grows with the square of the
        // length would take hours.
        let (taken, shown) = (start.elapsed(), prompt.chars().take(6).collect::<String>());
        assert!(taken < Duration::from_secs(60), "{shown:?} took {taken:?}");
    }
}

#[test]
fn unusable_folders_are_model_errors() {
    let folder = tempfile::tempdir().unwrap();
    let clip = || ClipTokenizer::from_dir(folder.path()).err().unwrap();
    let t5 = || T5Tokenizer::from_dir(folder.path()).err().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();

    assert_eq!((clip().kind(), t5().kind()), (ErrorKind::Model, ErrorKind::Model));
    write("spiece.model", "x");
    assert!(t5().hint_text().unwrap().contains("spiece.model"));
    for damaged in ["", "{", "[]", "null", "{\"a\": -1}", "../nowhere"] {
        write("vocab.json", damaged);
        write("merges.txt", "#version\n");
        write("tokenizer.json", damaged);
        assert_eq!((clip().kind(), t5().kind()), (ErrorKind::Model, ErrorKind::Model));
    }
    write("vocab.json", "{\"a\": 0}");
    assert!(clip().to_string().contains("<|startoftext|>"), "{}", clip());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_has_ids(prompt in "\\PC{0,80}|[\\x00-\\u{10FFFF}]{0,200}|[ -ÿ€™“”<|>&;!]{0,200}") {
        for (name, tokens) in GOLDEN.encode(&prompt) {
            check_form(name, &tokens);
            let empty = encode_as(name, "");
            let (end, expected) = (tokens.ids[tokens.len - 1], empty.ids[empty.len - 1]);
            prop_assert_eq!(end, expected, "{} of {:?} has no end mark", name, prompt);
        }
    }
}
