//! Outputs are complete or absent, and nothing is replaced unasked.

use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::process::Stdio;

use crate::harness::{Bench, Generate};

#[test]
fn places_that_cannot_be_written_are_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.path("folder.mp4")).expect("a folder");
    bench.write("file", "hello");
    let long = format!("{}.mp4", "x".repeat(300));
    let refused: &[(&str, i32, &[&str])] = &[
        ("folder.mp4", 2, &["folder.mp4 is a directory"]),
        ("folder.mp4/", 2, &["folder.mp4/"]),
        (".", 2, &["cannot tell the format"]),
        ("nowhere/out.mp4", 7, &["directory nowhere", "mkdir -p nowhere"]),
        // What a read-only folder is to others, root may write to; this nobody can.
        ("file/out.mp4", 7, &["file/out.mp4", "Not a directory"]),
        ("/proc/self/out.mp4", 7, &["/proc/self"]),
        (&long, 7, &["too long"]),
        ("out.webm", 2, &["out.webm", ".mp4, .png, .gif or .y4m"]),
        ("out", 2, &["format of out"]),
        ("/dev/full", 2, &["/dev/full"]),
        ("", 2, &["--output"]),
    ];
    for (output, code, parts) in refused {
        bench.refuses(&Generate::to(*output), *code, parts);
    }
    bench.write("taken.mp4.units", "mine");
    bench.refuses(&Generate::to("taken.mp4"), 7, &["taken.mp4.units"]);
    let store = Generate::new().set("--store", "file/store");
    bench.refuses(&store, 7, &["file/store", "another folder for converted weights"]);
    bench.refuses(&Generate::to("-"), 2, &["--json", "standard output"]);
    let resumed = Generate::to("-").flag("--resume");
    bench.generate(&resumed).fails(2, &["no units are kept", "--resume"]);
}

#[test]
fn nothing_is_replaced_unasked() {
    let bench = Bench::new();
    for name in ["out.mp4", "many-00003.png", "target.mp4"] {
        bench.write(name, "mine");
    }
    symlink(bench.path("target.mp4"), bench.path("link.mp4")).expect("a link");
    for (output, there) in
        [("out.mp4", "out.mp4"), ("many.png", "many-00003.png"), ("link.mp4", "link.mp4")]
    {
        bench.refuses(&Generate::to(output), 2, &[there, "exists already", "-y"]);
    }
    for name in ["out.mp4", "many-00003.png", "target.mp4"] {
        assert_eq!(bench.read(name), b"mine", "{name}");
    }
    bench.generate(&Generate::new().flag("-y")).ok();
    assert_eq!(&bench.read("out.mp4")[4..8], b"ftyp");
    bench.generate(&Generate::to("link.mp4").flag("-y")).ok();
    assert!(bench.path("link.mp4").is_symlink(), "a link stays a link");
    assert!(bench.read("target.mp4") == bench.read("out.mp4"));
    bench.generate(&Generate::to("many.png").flag("-y")).ok();
    assert!(bench.read("many-00003.png").starts_with(b"\x89PNG"));
}

#[test]
fn odd_names_work() {
    let bench = Bench::new();
    let name = std::ffi::OsString::from_vec(b"\xff \n'.mp4".to_vec());
    bench.generate(&Generate::to(name.clone())).ok();
    bench.generate(&Generate::to(name.clone()).flag("-y").flag("--json")).ok();
    assert_eq!(&bench.read(&name)[4..8], b"ftyp");
}

#[test]
fn streams_that_take_nothing_cause_no_panic() {
    let bench = Bench::new();
    let full = || Stdio::from(OpenOptions::new().write(true).open("/dev/full").expect("a device"));
    for (output, flag) in [("-", "--quiet"), ("out.mp4", "--json")] {
        let ask = Generate::to(output).flag(flag);
        let mut command = bench.command(ask.args());
        command.stdout(full());
        bench.start(command).finish().fails(7, &["standard output"]);

        let mut command = bench.command(ask.args());
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        command.stdout(writer);
        bench.start(command).finish().fails(7, &["standard output"]);
    }
    assert_eq!(bench.files(), Vec::<String>::new());
    let mut command = bench.command(["plan", "--model", "sd3-384p", "--units", "1"]);
    command.stdout(full());
    bench.start(command).finish().fails(7, &["standard output"]);

    // Nobody hears the messages: the work is done, the exit code tells.
    for (model, code) in [(crate::harness::golden("sd3"), 0), ("nowhere".into(), 4)] {
        let mut command = bench.command(Generate::new().set("--model", model).args());
        command.stderr(full());
        let run = bench.start(command).finish();
        run.check(run.code() == Some(code), "its exit code");
    }
    assert_eq!(bench.files(), ["out.mp4"]);
}
