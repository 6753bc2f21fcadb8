//! Completions and manual pages: made of the parser, so that they know every command.

use std::process::Command;

use crate::harness::Bench;

/// What every shell and manual must know.
const KNOWN: [&str; 3] = ["generate", "save-latents", "completions"];

#[test]
fn completions_know_the_commands_and_options() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = bench.run(["completions", shell]).ok().text();
        for part in KNOWN {
            assert!(script.contains(part), "{shell} lacks {part}");
        }
        // The shell itself must be able to read it, where it is there.
        bench.write("script", &script);
        if ["bash", "zsh", "fish"].contains(&shell)
            && let Ok(read) = Command::new(shell).arg("-n").arg(bench.path("script")).status()
        {
            assert!(read.success(), "{shell} -n");
        }
    }
    bench.run(["completions", "cmd"]).fails(2, &["cmd", "bash"]);
}

#[test]
fn manual_pages_are_written_for_every_command() {
    let bench = Bench::new();
    let run = bench.run(["man", "a/man1"]).ok();
    run.check(run.stderr.contains("pages to a/man1"), "what was written");
    let help = bench.run(["--help"]).ok().text();
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|n| !n.is_empty()))
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.len() > 10, "{commands:?}");
    for name in &commands {
        let page = String::from_utf8(bench.read(format!("a/man1/pyraflow-{name}.1")));
        let page = page.expect("UTF-8");
        assert!(page.contains(&format!(".TH pyraflow-{name} 1")), "{page}");
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
    let pages = bench.files().iter().filter(|f| f.ends_with(".1")).count();
    assert_eq!(pages, commands.len() + 1, "{:?}", bench.files());
    let page = String::from_utf8(bench.read("a/man1/pyraflow-generate.1")).expect("UTF-8");
    assert!(page.contains("save\\-latents"), "{page}");
    bench.write("file", "");
    bench.run(["man", "file"]).fails(7, &["cannot create file"]);
}
