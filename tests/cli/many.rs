//! `generate --prompts`: real runs of a handful of lines. What holds for a thousand is in
//! `tests/batch.rs`.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::harness::{Bench, Generate, Run};

/// `generate --prompts FILE` into the folder `out`.
fn many(file: &str) -> Generate {
    Generate::to("out").no_prompt().without("--seed").set("--prompts", file)
}

const LINES: &str = r#"{"prompt": "a fox", "seed": 1}
{"prompt": "a bear", "seed": 2, "units": 1, "output": "bears/one.png"}
# nothing

{"prompt": "a wolf", "stepz": 3}
{"prompt": "a wolf", "steps": 2, "video_steps": [2, 1, 1], "guidance": 3.5, "size": "128x64"}
{"prompt": "a fox", "seed": 1}
{"prompt": "a hare", "size": "63x64"}
{"prompt": "a hare", "image": "no.png"}
"#;

fn records(bench: &Bench, name: &str) -> Vec<Value> {
    let text = String::from_utf8(bench.read(name)).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The outputs, sorted, without the records.
fn outputs(bench: &Bench, folder: &str) -> Vec<(String, Vec<u8>)> {
    let names = bench.files().into_iter().filter(|f| f.starts_with(folder));
    names
        .filter(|f| !f.ends_with(".jsonl") && !f.ends_with('/'))
        .map(|f| (f[folder.len()..].to_string(), bench.read(&f)))
        .collect()
}

fn summary(run: &Run) -> Value {
    run.events().pop().expect("an event")["lines"].clone()
}

#[test]
fn every_good_line_becomes_a_video_of_its_own_settings() {
    let bench = Bench::new();
    bench.write("p.jsonl", LINES);
    let run = bench.generate(&many("p.jsonl"));
    run.check(bench.files() == ["p.jsonl"], "nothing but the prompts");
    let run =
        run.fails(3, &["error: line 5: unknown field `stepz`", "3 bad lines", "--keep-going"]);
    run.check(run.stderr.contains("line 8") && run.stderr.contains("line 9"), "the others");

    let run = bench.generate(&many("p.jsonl").flag("--keep-going")).fails(3, &["line 5"]);
    run.check(run.stderr.contains("3 made, 3 bad lines, 1 repeated lines"), "a summary");
    let made = outputs(&bench, "out/");
    assert_eq!(made.len(), 3, "{:?}", bench.files());
    assert!(
        made[0].0.starts_with("1-a-fox-") && made[2].0 == "bears/one.png",
        "{:?}",
        bench.files()
    );
    let fox = bench.run(["inspect", "--json", &format!("out/{}", made[0].0)]).ok().text();
    let fox: Value = serde_json::from_str(&fox).expect("JSON");
    assert_eq!((&fox["settings"]["seed"], &fox["frames"]), (&1.into(), &9.into()));
    // The very video of a run of its own.
    bench.generate(&Generate::to("alone.mp4")).ok();
    assert!(bench.read("alone.mp4") == made[0].1);
    let wolf = bench.run(["inspect", "--json", &format!("out/{}", made[1].0)]).ok().text();
    let wolf: Value = serde_json::from_str(&wolf).expect("JSON");
    assert_eq!(wolf["settings"]["video_steps"], serde_json::json!([2, 1, 1]));
    assert_eq!((&wolf["width"], &wolf["settings"]["guidance"]), (&128.into(), &3.5.into()));

    let records = records(&bench, "out/results.jsonl");
    let count = |status: &str| records.iter().filter(|r| r["status"] == status).count();
    assert_eq!((records.len(), count("done"), count("bad")), (6, 3, 3), "{records:?}");
    let done = records.iter().find(|r| r["line"] == 1).expect("line 1");
    assert!(done["seconds"]["sampling"].as_f64().expect("seconds") > 0.0);
    assert_eq!(done["settings"]["prompt"], "a fox");

    // Again: all is there, and nothing is recorded twice.
    let before = bench.files();
    let again = bench.generate(&many("p.jsonl").flag("--keep-going").flag("--json"));
    assert_eq!(summary(&again)["there"], 3);
    assert_eq!((bench.files(), self::records(&bench, "out/results.jsonl")), (before, records));
}

#[test]
fn two_shards_are_one_run() {
    let bench = Bench::new();
    bench.write("p.txt", "a fox\r\na bear\n\na wolf\na fox\n");
    let quick = |folder: &str| many("p.txt").set("--units", "1").set("-o", folder);
    bench.generate(&quick("whole").set("--format", "gif")).ok();
    for shard in ["1/2", "0/2"] {
        let run = bench.generate(&quick("parts").set("--format", "gif").set("--shard", shard));
        run.ok();
    }
    let whole = outputs(&bench, "whole/");
    assert_eq!(whole.len(), 4, "equal lines have seeds of their own: {:?}", bench.files());
    assert!(whole == outputs(&bench, "parts/"));
    bench.generate(&many("p.txt").set("--shard", "2/2")).fails(2, &["count from 0"]);
}

#[test]
fn a_stopped_run_goes_on_where_it_was() {
    let bench = Bench::new();
    bench.write("p.txt", "a fox\na bear\na wolf\n");
    let slow = |folder: &str| {
        many("p.txt")
            .set("--units", "4")
            .set("--steps", "30")
            .set("--video-steps", "30")
            .set("-o", folder)
    };
    let mut stopped = 0;
    for signal in ["INT", "KILL", "KILL"] {
        let mut running = bench.start(bench.command(slow("out").args()));
        let units = |files: &[String]| files.iter().filter(|f| f.contains("/unit-")).count();
        let there = units(&bench.files());
        if running.wait_for(|files| units(files) > there) {
            running.signal(signal);
            stopped += 1;
        }
        running.finish();
    }
    assert_eq!(stopped, 3);
    let run = bench.generate(&slow("out")).ok();
    run.check(run.stderr.contains("3 made") || run.stderr.contains("there already"), "a summary");
    bench.generate(&slow("whole")).ok();
    assert!(outputs(&bench, "whole/") == outputs(&bench, "out/"));
    assert_eq!(records(&bench, "out/results.jsonl").len(), 3, "each once");
}

#[test]
fn prompts_come_through_a_pipe_and_files_of_others_stay() {
    let bench = Bench::new();
    fs::create_dir(bench.path("out")).expect("a folder");
    bench.write("out/a.gif", "mine");
    let ask = many("-").set("--units", "1").flag("--keep-going").flag("--json");
    let piped = |ask: &Generate| {
        let mut command = bench.command(ask.args());
        command.stdin(Stdio::piped());
        let mut running = bench.start(command);
        let mut pipe = running.child.stdin.take().expect("a pipe");
        let lines = "{\"prompt\": \"a fox\", \"output\": \"a.gif\"}\n{\"prompt\": \"a bear\"}\n";
        pipe.write_all(lines.as_bytes()).expect("written");
        drop(pipe);
        running.finish()
    };
    let run = piped(&ask).fails(2, &["line 1", "a.gif exists already"]);
    assert_eq!((&summary(&run)["done"], &summary(&run)["failed"]), (&1.into(), &1.into()));
    assert_eq!(bench.read("out/a.gif"), b"mine");
    let run = piped(&ask.clone().flag("-y")).ok();
    assert_eq!((&summary(&run)["done"], &summary(&run)["there"]), (&1.into(), &1.into()));
    assert!(bench.read("out/a.gif").starts_with(b"GIF89a"));
}

#[test]
fn what_cannot_be_done_with_many_is_refused() {
    let bench = Bench::new();
    bench.write("p.txt", "a fox\n");
    bench.write("empty.txt", "\n# no prompt\n");
    for (ask, code, part) in [
        (many("nowhere.txt"), 3, "nowhere.txt"),
        (many("empty.txt"), 3, "no prompts"),
        (many("p.txt").prompt("a bear"), 2, "--prompts"),
        (many("p.txt").flag("--resume"), 2, "--resume is for a single video"),
        (many("p.txt").set("--save-latents", "x"), 2, "--save-latents is for a single video"),
        (many("p.txt").set("--format", "webm"), 2, "mp4, png, gif or y4m"),
        (many("p.txt").set("--steps", "0"), 3, "line 1: first unit"),
        (Generate::new().flag("--keep-going"), 2, "--prompts FILE"),
        (Generate::new().set("--shard", "0/2"), 2, "--shard is for many"),
    ] {
        bench.refuses(&ask, code, &[part]);
    }
    bench.write("file", "");
    bench.refuses(&many("p.txt").set("-o", "file"), 7, &["cannot create file"]);
}

#[test]
fn a_line_of_a_size_the_model_was_not_made_for_is_bad_unless_forced() {
    let bench = Bench::new();
    let lines = "{\"prompt\": \"a star\", \"units\": 1}\n\
                 {\"prompt\": \"a star\", \"units\": 1, \"size\": \"64x64\"}\n\
                 {\"prompt\": \"a star\", \"units\": 10}\n";
    bench.write("p.jsonl", lines);
    let ask = many("p.jsonl").without("--model").without("--size").without("--force");
    let parts = ["line 2: the 128p model was not made for 64x64", "2 bad lines"];
    bench.refuses(&ask, 3, &parts);
    let run = bench.generate(&ask.clone().flag("--keep-going").flag("--json"));
    let told = run.text().contains("line 3: the 128p model was not made for 10 latent frames");
    run.check(told, "the length");
    let lines = summary(&run.fails(3, &["line 2"]));
    assert_eq!((&lines["done"], &lines["bad"]), (&1.into(), &2.into()));
    let run = bench.generate(&ask.flag("--force").flag("--json")).ok();
    assert_eq!((&summary(&run)["done"], &summary(&run)["there"]), (&2.into(), &1.into()));
}
