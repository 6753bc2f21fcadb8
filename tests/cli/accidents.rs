//! Interrupts, kills and full disks: at most one unit is lost, and `--resume` makes the very
//! video that an undisturbed run makes.

use std::fs;
use std::path::Path;

use crate::harness::{Bench, Generate, Run};

const FIRST_UNIT: &str = "out.mp4.units/unit-0000.safetensors";
const THIRD_UNIT: &str = "out.mp4.units/unit-0002.safetensors";

/// A run that takes some seconds.
fn long() -> Generate {
    Generate::new().set("--units", "5").set("--steps", "40").set("--video-steps", "40")
}

/// Runs until `there` says that the files are as wanted, then sends `signal`.
#[track_caller]
fn stop(bench: &Bench, ask: &Generate, signal: &str, there: impl Fn(&[String]) -> bool) -> Run {
    let mut running = bench.start(bench.command(ask.args()));
    let in_time = running.wait_for(there);
    if in_time {
        running.signal(signal);
    }
    let run = running.finish();
    run.check(in_time, "the moment of the signal before the end");
    run
}

fn has(name: &'static str) -> impl Fn(&[String]) -> bool {
    move |files| files.iter().any(|f| f == name)
}

/// The video of an undisturbed run.
fn undisturbed(bench: &Bench, ask: &Generate) -> Vec<u8> {
    bench.generate(&ask.clone().set("-o", "whole.mp4")).ok();
    bench.read("whole.mp4")
}

#[test]
fn an_interrupt_keeps_the_units() {
    let bench = Bench::new();
    let mut video = Vec::new();
    for signal in ["INT", "TERM"] {
        let run = stop(&bench, &long(), signal, has(FIRST_UNIT));
        run.fails(130, &["hint: finished units are in out.mp4.units; --resume goes on"]);
        assert!(bench.path(FIRST_UNIT).exists() && !bench.path("out.mp4").exists());
        assert!(!bench.files().iter().any(|f| f.ends_with(".part") || f.ends_with(".partial")));
        bench.refuses(&long(), 2, &["out.mp4.units", "unfinished run", "--resume", "-y"]);
        bench.generate(&long().flag("--resume")).ok();
        assert_eq!(bench.files(), ["out.mp4"]);
        video = bench.read("out.mp4");
        fs::remove_file(bench.path("out.mp4")).expect("removable");
    }
    assert!(video == undisturbed(&bench, &long()));
}

#[test]
fn an_interrupt_of_the_decoder_leaves_no_video() {
    let bench = Bench::new();
    let run = stop(&bench, &long(), "INT", has("out.mp4.units/unit-0004.safetensors"));
    run.fails(130, &["--resume goes on"]);
    let left = bench.files();
    assert!(left.iter().all(|f| f.starts_with("out.mp4.units/")), "{left:?}");
    assert_eq!(left.len(), 7, "the folder, its description and five units: {left:?}");
    bench.generate(&long().flag("--resume")).ok();
    assert_eq!(bench.files(), ["out.mp4"]);
}

#[test]
fn a_second_interrupt_ends_at_once() {
    let bench = Bench::new();
    let mut running = bench.start(bench.command(long().args()));
    assert!(running.wait_for(has(FIRST_UNIT)));
    running.signal("INT");
    running.signal("INT");
    let run = running.finish();
    run.check(run.code() == Some(130), "exit code 130");
    assert!(bench.path(FIRST_UNIT).exists() && !bench.path("out.mp4").exists());
    bench.generate(&long().flag("--resume")).ok();
}

#[test]
fn a_kill_at_any_moment_costs_one_unit_at_most() {
    let bench = Bench::new();
    let ask = long();
    let resumed = ask.clone().flag("--resume");
    stop(&bench, &ask, "KILL", has("out.mp4.units/run.json"));
    stop(&bench, &resumed, "KILL", has(FIRST_UNIT));
    stop(&bench, &resumed, "KILL", has(THIRD_UNIT));
    let third = bench.read(THIRD_UNIT);
    // All are there: while they are decoded.
    stop(&bench, &resumed, "KILL", has("out.mp4.units/unit-0004.safetensors"));
    assert!(bench.read(THIRD_UNIT) == third, "a finished unit is not made again");
    assert!(!bench.path("out.mp4").exists());
    bench.generate(&resumed).ok();
    assert!(bench.read("out.mp4") == undisturbed(&bench, &ask));
    assert!(!bench.path("out.mp4.units").exists());
}

#[test]
fn torn_and_foreign_units_are_ignored() {
    let bench = Bench::new();
    let ask = Generate::new().set("--units", "3").flag("--keep-units");
    bench.generate(&ask).ok();
    let whole = bench.read("out.mp4");
    let unit = |i: usize| format!("out.mp4.units/unit-{i:04}.safetensors");
    let units: Vec<Vec<u8>> = (0..3).map(|i| bench.read(unit(i))).collect();
    let resumed = ask.flag("--resume").flag("-y");
    let mut flipped = units[1].clone();
    *flipped.last_mut().expect("a byte") ^= 1;
    for damaged in [&units[1][..units[1].len() / 2], &flipped, &units[0][..0], b"hello"] {
        bench.write(unit(1), damaged);
        bench.generate(&resumed).ok();
        assert!(bench.read("out.mp4") == whole);
        assert!(bench.read(unit(1)) == units[1], "the unit is made again");
    }
    // A unit of another seed, whole in itself.
    bench.generate(&Generate::to("b.mp4").set("--seed", "2").flag("--keep-units")).ok();
    fs::copy(bench.path("b.mp4.units/unit-0001.safetensors"), bench.path(unit(1))).expect("a copy");
    bench.generate(&resumed).ok();
    assert!(bench.read("out.mp4") == whole);
    bench.write("out.mp4.units/run.json", "{");
    bench.refuses(&resumed, 3, &["out.mp4.units/run.json is damaged"]);
}

#[test]
fn another_run_is_not_resumed() {
    let bench = Bench::new();
    let ask = Generate::new().flag("--keep-units");
    bench.generate(&ask).ok();
    fs::remove_file(bench.path("out.mp4")).expect("removable");
    let resumed = ask.clone().flag("--resume");
    let model = bench.copy_model("flux");
    for (changed, field) in [
        (resumed.clone().set("--seed", "2"), "seed is 1 there, 2 here"),
        (resumed.clone().prompt("a bear"), "prompt is \"a fox\" there, \"a bear\" here"),
        (resumed.clone().set("--size", "128x64"), "width is 64 there, 128 here"),
        (resumed.clone().set("--steps", "2"), "steps is [1,1,1] there, [2,2,2] here"),
        (resumed.clone().set("--guidance", "3"), "guidance is 9.0 there, 3.0 here"),
        (resumed.clone().flag("--linear-guidance"), "linear_guidance is nothing there"),
        (resumed.clone().set("--model", &model), "family is \"sd3\" there, \"miniflux\" here"),
    ] {
        bench.refuses(&changed, 3, &["units of another run", field]);
    }
    // Longer is no other run: its first units are the same.
    bench.generate(&resumed.set("--units", "3")).ok();
    let whole = bench.read("out.mp4");
    bench.generate(&Generate::to("new.mp4").set("--units", "3")).ok();
    assert!(whole == bench.read("new.mp4"));
    // And -y starts anew whatever is there.
    bench.generate(&ask.without("--keep-units").set("--seed", "2").flag("-y")).ok();
    assert_eq!(bench.files(), ["new.mp4", "out.mp4"]);
}

/// Files may not grow beyond `blocks` of 512 bytes, as if the disk were full.
fn on_a_full_disk(bench: &Bench, ask: &Generate, blocks: u32) -> Run {
    let limit = format!("trap '' XFSZ; ulimit -f {blocks}");
    bench.start(bench.shell(&limit, ask)).finish()
}

#[test]
fn a_full_disk_loses_nothing() {
    let bench = Bench::new();
    let ask = Generate::to("out.y4m").set("--units", "3");
    // No room for converted weights.
    on_a_full_disk(&bench, &ask, 32)
        .fails(7, &["store", "free some space, or name another folder with --store"]);
    let store = || {
        let folders = fs::read_dir(bench.path("store")).into_iter().flatten().flatten();
        folders.flat_map(|f| fs::read_dir(f.path()).into_iter().flatten().flatten()).count()
    };
    let left = store();
    assert_eq!(left, 0, "no half-converted weights");
    assert_eq!(bench.files(), Vec::<String>::new());
    bench.generate(&ask.clone().set("-o", "whole.y4m")).ok();
    assert!(store() > left, "the conversion was completed");

    // Room for the description of the run, not for a unit.
    on_a_full_disk(&bench, &ask, 4).fails(7, &["unit-0000", "free some space"]);
    assert_eq!(bench.files(), ["out.y4m.units/", "out.y4m.units/run.json", "whole.y4m"]);

    // Room for the units, not for the video.
    let resumed = ask.flag("--resume");
    on_a_full_disk(&bench, &resumed, 64).fails(7, &["cannot write", "out.y4m", "free some space"]);
    let kept: Vec<String> = bench.files().into_iter().filter(|f| f.contains("unit-")).collect();
    assert_eq!(kept.len(), 3, "{kept:?}");
    assert!(!bench.path("out.y4m").exists());
    assert!(!bench.files().iter().any(|f| f.ends_with(".part")));
    bench.generate(&resumed).ok();
    assert!(bench.read("out.y4m") == bench.read("whole.y4m"));
    assert!(!Path::new(&bench.path("out.y4m.units")).exists());

    // An existing video survives a failed attempt to replace it.
    let replacing = Generate::to("out.y4m").set("--units", "3").set("--seed", "9").flag("-y");
    on_a_full_disk(&bench, &replacing, 64).fails(7, &["out.y4m"]);
    assert!(bench.read("out.y4m") == bench.read("whole.y4m"));
}
