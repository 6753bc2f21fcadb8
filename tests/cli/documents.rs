//! What the documents say: errors as they really are, every exit code, links that lead somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::Bench;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The lines in fences of this language, with the number that their section begins with.
fn fenced(document: &str, language: &str) -> Vec<(i32, String)> {
    let (mut code, mut inside, mut found) = (0, false, Vec::new());
    for line in document.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            code = title.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
        } else if line.starts_with("```") {
            inside = !inside && line == format!("```{language}");
        } else if inside {
            found.push((code, line.to_string()));
        }
    }
    found
}

/// Whether `line` is the pattern, in which `…` stands for anything.
fn is_like(line: &str, pattern: &str) -> bool {
    let Some((first, others)) = pattern.split_once('…') else { return line == pattern };
    let (between, last) = others.rsplit_once('…').unwrap_or(("", others));
    let Some(mut rest) = line.strip_prefix(first).and_then(|rest| rest.strip_suffix(last)) else {
        return false;
    };
    between.split('…').all(|part| match rest.split_once(part) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    })
}

#[test]
fn every_exit_code_has_its_section() {
    let source = text("src/error.rs");
    let codes: BTreeSet<i32> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix("ErrorKind::")?.split_once(" => "))
        .filter_map(|(_, code)| code.trim_end_matches(',').parse().ok())
        .collect();
    assert!(codes.len() >= 9, "{codes:?}");
    let document = text("docs/errors.md");
    let told = fenced(&document, "console").into_iter().chain(fenced(&document, "text"));
    let with_messages: BTreeSet<i32> =
        told.filter(|(_, line)| line.starts_with("error: ")).map(|(code, _)| code).collect();
    assert_eq!(with_messages, codes, "docs/errors.md has a section and a message for each");
    for code in codes {
        assert!(document.contains(&format!("| [{code}](#{code}-")), "{code} is in the table");
    }
}

#[test]
fn commands_in_the_index_of_errors_say_what_it_says() {
    let bench = Bench::new();
    for name in ["fox.mp4", "prompts.txt"] {
        bench.write(name, "");
    }
    bench.write("picture.png", "no picture");
    bench.write(
        "jobs.jsonl",
        "{\"prompt\": \"a fox\"}\n{\"prompt\": \"a fox\", \"size\": \"1x1\"}\n",
    );
    fs::create_dir(bench.path("empty")).expect("a folder");
    let binary = Path::new(env!("CARGO_BIN_EXE_pyraflow")).parent().expect("a folder");
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap_or_default());
    let lines = fenced(&text("docs/errors.md"), "console");
    let mut commands = 0;
    for (at, (code, line)) in lines.iter().enumerate() {
        let Some(command) = line.strip_prefix("$ ") else { continue };
        let wanted: Vec<&String> =
            lines[at + 1..].iter().map(|(_, l)| l).take_while(|l| !l.starts_with("$ ")).collect();
        let before = bench.files();
        let mut shell = Command::new("sh");
        shell.args(["-c", command]);
        let mut shell = bench.prepare(shell);
        shell.env("PATH", &path);
        let run = bench.start(shell).finish();
        run.check(run.code() == Some(*code), &format!("exit code {code}"));
        let said: Vec<&str> =
            run.stderr.lines().skip_while(|line| !line.starts_with("error: ")).collect();
        for (number, wanted) in wanted.iter().enumerate() {
            let same = said.get(number).is_some_and(|said| is_like(said, wanted));
            run.check(same, &format!("the line {wanted:?}"));
        }
        assert!(!wanted.is_empty() && bench.files() == before, "{command}");
        commands += 1;
    }
    assert!(commands > 10, "{commands}");
}

/// All Rust code, with strings that go on over lines made whole.
fn sources() -> String {
    fn collect(dir: PathBuf, all: &mut String) {
        for entry in fs::read_dir(dir).expect("a folder").flatten() {
            if entry.path().is_dir() {
                collect(entry.path(), all);
            } else {
                *all += &fs::read_to_string(entry.path()).expect("a source");
            }
        }
    }
    let mut all = String::new();
    collect(root().join("src"), &mut all);
    let mut lines = all.split("\\\n");
    let first = lines.next().unwrap_or("").to_string();
    lines.fold(first, |whole, line| whole + line.trim_start())
}

#[test]
fn other_messages_in_the_index_of_errors_are_in_the_program() {
    let sources = sources();
    let mut checked = 0;
    for (code, line) in fenced(&text("docs/errors.md"), "text") {
        let message = line.trim_start();
        let message = message.strip_prefix("error: ").or(message.strip_prefix("hint: "));
        let message = message.unwrap_or_else(|| panic!("{code}: {line:?} is no message"));
        for part in message.split('…').filter(|part| part.trim().len() > 3) {
            assert!(sources.contains(part), "{code}: nothing says {part:?}");
            checked += 1;
        }
    }
    assert!(checked > 20, "{checked}");
}

/// As headings are addressed on GitHub.
fn anchors(document: &str) -> BTreeSet<String> {
    let title = |line: &str| {
        let text = line.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|&c| c.is_alphanumeric() || " -_".contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let mut code = false;
    let headings = document.lines().filter(|line| {
        code ^= line.starts_with("```");
        !code && line.starts_with('#')
    });
    headings.map(title).collect()
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    let documents = ["README.md", "docs/commands.md", "docs/cookbook.md", "docs/decisions.md"];
    let more = [
        "docs/building.md",
        "docs/checks.md",
        "docs/errors.md",
        "docs/formats.md",
        "docs/models.md",
        "docs/performance.md",
    ];
    let mut links = 0;
    for document in documents.iter().chain(&more) {
        let content = text(document);
        for link in content.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let folder = root().join(document).parent().expect("a folder").to_path_buf();
            let target = if path.is_empty() { root().join(document) } else { folder.join(path) };
            assert!(target.exists(), "{document}: {link}");
            if !anchor.is_empty() {
                let target = fs::read_to_string(&target).expect("a document");
                assert!(anchors(&target).contains(anchor), "{document}: {link}");
            }
            links += 1;
        }
    }
    assert!(links > 20, "{links}");
}
